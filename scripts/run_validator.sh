#!/usr/bin/env bash
# Builds the validator from this clone and runs it in this terminal; arguments go to `quasar-validator run`.
#
#   scripts/run_validator.sh --network finney --netuid 24 --owner-identity SS58 --wallet-name W --hotkey-name H --s3-bucket B
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cargo xtask setup
cargo build --locked --release --package quasar-validator
exec "${CARGO_TARGET_DIR:-target}/release/quasar-validator" run "$@"
