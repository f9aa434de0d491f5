#!/bin/sh
# Makes the Python environment of the interoperability tests: the official packages, in a folder of their own.
# 11.1.0 is the newest bittensor that speaks to runtimes before SubnetEpochConsensus, as spec 461 is.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$here/.venv"}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check bittensor==11.1.0 bittensor-core==0.1.5 bittensor-wallet==4.1.1
"$venv/bin/python" -c 'import bittensor, bittensor_wallet; print("ready:", bittensor.__version__)'
