#!/usr/bin/env bash
# Builds one role from this clone and installs it as a systemd service.
#
#   scripts/install.sh miner|validator|orchestrator [options]
#
#   --wallet-name W --hotkey-name H   copy this hotkey (never the coldkey) to /etc/quasar/wallets and name it in the settings
#   --wallet-path P                   where the wallets are (default ~/.bittensor/wallets)
#   --cuda                            also install the full torch 2.11.0 (2.7 GB, from PyPI) for GPUs, into /opt/quasar/torch
#
# Run it as the person who owns the clone; it uses sudo for what needs root. Running it again upgrades: programs, libraries
# and unit are replaced, settings in /etc/quasar and state in /var/lib are kept. The service is not started: look at
# /etc/quasar/ROLE.toml first.
set -euo pipefail
clone="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
prefix=/opt/quasar
settings=/etc/quasar

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'; }
fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 64
}
as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi; }

role="${1:-}"
case "$role" in
    miner | validator | orchestrator) shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "the first argument must be miner, validator or orchestrator" "scripts/install.sh --help" ;;
esac
wallets="$HOME/.bittensor/wallets" wallet='' hotkey='' cuda=no
while [ $# -gt 0 ]; do
    case "$1" in
        --wallet-path) wallets="${2:?--wallet-path needs a folder}"; shift 2 ;;
        --wallet-name) wallet="${2:?--wallet-name needs a name}"; shift 2 ;;
        --hotkey-name) hotkey="${2:?--hotkey-name needs a name}"; shift 2 ;;
        --cuda) cuda=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown option $1" "scripts/install.sh --help" ;;
    esac
done
if [ -n "$wallet$hotkey" ]; then
    if [ -z "$wallet" ] || [ -z "$hotkey" ]; then fail "--wallet-name and --hotkey-name go together" "name both"; fi
    key="$wallets/$wallet/hotkeys/$hotkey"
    [ -r "$key" ] || fail "cannot read $key" "check --wallet-path, --wallet-name and --hotkey-name"
fi
if [ "$cuda" = yes ] && [ "$role" = orchestrator ]; then
    fail "the orchestrator uses no GPU" "leave --cuda out"
fi

cd "$clone"
cargo xtask setup
cargo build --locked --release --package "quasar-$role"
built="${CARGO_TARGET_DIR:-$clone/target}/release/quasar-$role"
libtorch="${LIBTORCH:-$clone/.libtorch}"

if ! id quasar >/dev/null 2>&1; then
    as_root useradd --system --user-group --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin quasar
fi
as_root install -d -m 0755 "$prefix/bin" "$prefix/lib/quasar" "$prefix/share/docs" "$settings"
# Under a new name and renamed, so that a running service keeps its old file.
as_root install -m 0755 "$built" "$prefix/bin/quasar-$role.new"
as_root mv -f "$prefix/bin/quasar-$role.new" "$prefix/bin/quasar-$role"
if [ "$role" != orchestrator ]; then
    # The programs look for libtorch in ../lib/quasar.
    as_root rm -rf "$prefix/lib/quasar.new"
    as_root cp -rP "$libtorch/lib" "$prefix/lib/quasar.new"
    as_root rm -rf "$prefix/lib/quasar"
    as_root mv "$prefix/lib/quasar.new" "$prefix/lib/quasar"
fi
as_root cp docs/*.md "$prefix/share/docs/"
as_root install -m 0644 "deploy/systemd/quasar-$role.service" /etc/systemd/system/

if [ ! -e "$settings/$role.toml" ]; then
    as_root install -m 0640 -g quasar "configs/$role.toml" "$settings/$role.toml"
fi
# One secrets or overrides file per role; systemd reads it as root.
if [ ! -e "$settings/$role.env" ]; then
    as_root install -m 0600 /dev/null "$settings/$role.env"
fi
if [ -n "$hotkey" ]; then
    as_root install -d -m 0750 -g quasar "$settings/wallets" "$settings/wallets/$wallet" "$settings/wallets/$wallet/hotkeys"
    as_root install -m 0400 -o quasar -g quasar "$key" "$settings/wallets/$wallet/hotkeys/$hotkey"
    as_root sed -i -e "s|^#* *\(name = \).*# wallet name\$|\1\"$wallet\"  # wallet name|" \
        -e "s|^#* *\(hotkey = \).*# hotkey name\$|\1\"$hotkey\"  # hotkey name|" "$settings/$role.toml"
fi
if [ "$cuda" = yes ]; then
    as_root python3 -m venv "$prefix/torch"
    as_root "$prefix/torch/bin/pip" install --no-cache-dir "torch==2.11.0"
    torch="$("$prefix/torch/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch"
    as_root sed -i "s|^#* *\(cuda_dir = \).*|\1\"$torch\"|" "$settings/$role.toml"
fi
if command -v systemctl >/dev/null; then as_root systemctl daemon-reload || true; fi

cat <<EOF

installed quasar-$role in $prefix.
next: edit $settings/$role.toml, then
  sudo systemctl enable --now quasar-$role
  journalctl -u quasar-$role -f
EOF
