#!/usr/bin/env python3
"""Mean next-token loss of a checkpoint on the first rows of a token file, by the executable specification.

    python held_out_loss.py CHECKPOINT TOKENS SEQUENCE_LENGTH ROWS
Needs torch and safetensors. Prints one number in nats.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import quasar_spec

BATCH = 16


def main() -> None:
    checkpoint, tokens, length, rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    config = json.loads((checkpoint / "config.json").read_text())
    weights = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights.update(load_file(file))
    ids = torch.frombuffer(bytearray(tokens.read_bytes()[: rows * length * 4]), dtype=torch.int32).long().view(-1, length)
    total = 0.0
    with torch.no_grad():
        for batch in ids.split(BATCH):
            total += float(quasar_spec.next_token_loss(quasar_spec.forward(batch, weights, config), batch)) * len(batch)
    print(total / len(ids))


if __name__ == "__main__":
    main()
