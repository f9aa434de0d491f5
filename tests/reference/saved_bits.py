#!/usr/bin/env python3
"""What the specification's reader finds in a checkpoint: one line for each tensor with its name, element type, shape and the SHA-256 of its
elements' bytes, sorted by name.

    python saved_bits.py CHECKPOINT
Needs torch and safetensors.
"""
import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main() -> None:
    weights = {}
    for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        weights.update(load_file(file))
    for name, tensor in sorted(weights.items()):
        elements = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        shape = "x".join(map(str, tensor.shape))
        print(name, str(tensor.dtype).removeprefix("torch."), shape, hashlib.sha256(elements).hexdigest())


if __name__ == "__main__":
    main()
