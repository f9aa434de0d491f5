#!/usr/bin/env bash
# Training steps of quasar-miner beside the same steps in PyTorch on one GPU, one after the other in the same run, as one table.
#
#   gpu.sh FOLDER_OF_QUASAR_MINER TORCH_FOLDER [LAYERS] [BATCHES]
#
# TORCH_FOLDER is the `torch` folder of a full torch 2.11.0 installation. The peer needs triton, fla-core 0.6.0 and einops in the Python
# that QUASAR_DEV_PYTHON names (default python3); without them our own numbers are printed alone. BATCHES: comma-separated, default 4,8.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
bin="$1" torch="$2" layers="${3:-6}" batches="${4:-4,8}"
python="${QUASAR_DEV_PYTHON:-python3}"
results="$(mktemp)"
trap 'rm -f "$results"' EXIT
libraries="$torch/lib"
for folder in "$(dirname "$torch")"/nvidia/*/lib; do
    if [ -d "$folder" ]; then libraries="$libraries:$folder"; fi
done
for batch in ${batches//,/ }; do
    LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$bin/quasar-miner" bench --layers "$layers" --batch "$batch" \
        --sequence-length 2048 --steps 10 --device cuda:0 --torch-cuda-dir "$torch" --json >>"$results"
done
"$python" "$here/gpu_peer.py" --layers "$layers" --runs "$batches" >>"$results" || echo "the peer did not run" >&2
"$python" - "$results" <<'TABLE'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
ours = {row["batch"]: row for row in rows if "peer" not in row}
peers = {row["batch"]: row for row in rows if "peer" in row and "batch" in row}
print(f"{'batch':>5} {'ours tok/s':>11} {'peer tok/s':>11} {'ratio':>6} {'ours GiB':>9} {'peer GiB':>9} {'ours loss':>10} {'peer loss':>10}")
for batch, our in sorted(ours.items()):
    peer = peers.get(batch)
    there = (f"{peer['tokens_per_s']:11.0f}", f"{our['tokens_per_s'] / peer['tokens_per_s']:6.2f}", f"{peer['peak_gib']:9.1f}", f"{peer['loss']:10.3f}") if peer else (" " * 11, " " * 6, " " * 9, " " * 10)
    print(f"{batch:5} {our['tokens_per_s']:11.0f} {there[0]} {there[1]} {our['peak_gib']:9.1f} {there[2]} {our['loss']:10.3f} {there[3]}")
TABLE
