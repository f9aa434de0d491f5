#!/usr/bin/env python3
"""Writes crates/fragments/tests/data/robust_merge.json: what robust_merge_sim.py makes of vectors that the Rust tests make too.

    python3 tests/reference/robust_merge_golden.py > crates/fragments/tests/data/robust_merge.json

Needs numpy.  Each case: learners with a part in common and a part of their own, some of them copies or sign-flipped.
"""
import json

import numpy as np

from robust_merge_sim import leave_one_out_filter, mutual_cosine_filter, rda_median

DIMENSIONS = 2000
MASK = (1 << 64) - 1


def values(seed, count):
    """The generator of the Rust fixtures: xorshift, the top 24 bits as a number from -1 to 1 in f32."""
    state = (seed * 0x9E3779B97F4A7C15 & MASK) | 1
    out = []
    for _ in range(count):
        state ^= state << 13 & MASK
        state ^= state >> 7
        state ^= state << 17 & MASK
        out.append((state >> 40) / (1 << 23) - 1)
    return np.array(out, dtype=np.float32)


def case(name, learners, common, copies=0, flipped=0):
    shared = values(99, DIMENSIONS)
    rows = [np.float32(common) * shared + values(seed + 1, DIMENSIONS) for seed in range(learners)]
    rows = [row * np.float32(2.0 ** (number % 3 - 1)) for number, row in enumerate(rows)]
    for number in range(copies):
        rows[learners - 1 - number] = rows[0]
    for number in range(flipped):
        rows[learners - 1 - number] = -rows[learners - 1 - number]
    x = np.array(rows, dtype=np.float64)
    weights = np.array([1 + number % 4 for number in range(learners)], dtype=np.float64)
    similar = mutual_cosine_filter(x)
    alone = np.zeros(learners, dtype=bool)
    alone[np.flatnonzero(similar)] = leave_one_out_filter(x[similar])
    merged = rda_median(x[alone], weights[alone])
    return {"name": name, "learners": learners, "common": common, "copies": copies, "flipped": flipped,
            "distinct": similar.tolist(), "kept": alone.tolist(), "norm": float(np.linalg.norm(merged)),
            "head": [float(value) for value in merged[:16]]}


print(json.dumps([
    case("honest", 12, 0.4),
    case("copies", 14, 0.3, copies=3),
    case("flipped", 12, 0.5, flipped=2),
    case("alike", 9, 2.0),
]))
