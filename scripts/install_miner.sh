#!/usr/bin/env bash
# Installs the miner from this clone as a systemd service; see scripts/install.sh for the options.
exec "$(dirname "${BASH_SOURCE[0]}")/install.sh" miner "$@"
