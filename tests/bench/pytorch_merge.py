#!/usr/bin/env python3
"""The robust merge of one fragment in PyTorch on the CPU: the yardstick of `cargo bench -p quasar-fragments`.

    pytorch_merge.py FOLDER LEARNERS THREADS ROUNDS

FOLDER holds the bf16 payloads 0.qfd, 1.qfd ... (64 bytes of header, then the values) and units.txt, one merge unit a line:
its elements and `rda` or `mean`.  The same steps as ours: norms per unit, clip to 1.5 medians, mutual cosines of the clipped
contributions, leave-one-out cosines, radial-directional average with the median norm or mean, cosines to the result.  The payloads
are in memory before the clock starts, one contribution is widened at a time, units are views: it is written to be fast.
Writes the result to merged.f32 and prints the best time in seconds by the clock and by processor time of a
thread, the version of PyTorch and the peak memory in MiB.
"""
import resource
import sys
import time

import torch

HEADER_BYTES = 64
NORM_CLIP, NORM_REJECT = 1.5, 10.0


def load(path, elements):
    return torch.from_file(path, shared=False, size=elements + HEADER_BYTES // 2, dtype=torch.bfloat16)[HEADER_BYTES // 2:].clone()


def merge(payloads, sizes, rda):
    learners = len(payloads)
    norms = torch.stack([torch.stack([torch.linalg.vector_norm(unit, dtype=torch.float32) for unit in payload.split(sizes)])
                         for payload in payloads])
    medians = norms.quantile(0.5, dim=0)
    total = norms.square().sum(1).sqrt()
    assert bool((total <= NORM_REJECT * total.quantile(0.5)).all())
    scales = torch.where(norms > NORM_CLIP * medians, NORM_CLIP * medians / norms, torch.ones_like(norms))
    length = (norms * scales).square().sum(1).sqrt()
    # Mutual cosines: all pairs, unit by unit.
    products = torch.zeros(learners, learners)
    for unit, parts in enumerate(zip(*(payload.split(sizes) for payload in payloads))):
        block = torch.stack(parts).float() * (scales[:, unit] / length)[:, None]
        products += block @ block.T
    near = (products - 2 * torch.eye(learners)).topk(5, dim=1).values.mean(1)
    assert bool((near <= near.median() + 1).all())
    # Leave-one-out cosines, by products with the sum of directions.
    direction = torch.zeros_like(payloads[0], dtype=torch.float32)
    for payload, scale, norm in zip(payloads, scales, length):
        for part, unit, factor in zip(direction.split(sizes), payload.split(sizes), scale / norm):
            part.add_(unit, alpha=float(factor))
    with_sum = torch.zeros(learners)
    for learner, payload in enumerate(payloads):
        for part, unit, factor in zip(direction.split(sizes), payload.split(sizes), scales[learner] / length[learner]):
            with_sum[learner] += factor * torch.dot(part, unit.float())
    # The merge.
    merged = torch.zeros_like(direction)
    for payload, scale, norm in zip(payloads, scales, norms):
        for part, unit, is_rda, s, n in zip(merged.split(sizes), payload.split(sizes), rda, scale, norm):
            part.add_(unit, alpha=float(1 / (learners * n)) if is_rda else float(s) / learners)
    radius = (norms * scales).quantile(0.5, dim=0)
    for part, is_rda, r in zip(merged.split(sizes), rda, radius):
        if is_rda:
            part.mul_(r / torch.linalg.vector_norm(part))
    cosines = torch.zeros(learners)
    for learner, payload in enumerate(payloads):
        for part, unit, factor in zip(merged.split(sizes), payload.split(sizes), scales[learner]):
            cosines[learner] += factor * torch.dot(part, unit.float())
    cosines /= length * torch.linalg.vector_norm(merged)
    return merged, near, with_sum, cosines


def main():
    folder, learners, threads, rounds = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    units = [line.split() for line in open(f"{folder}/units.txt")]
    sizes, rda = [int(size) for size, _ in units], [rule == "rda" for _, rule in units]
    payloads = [load(f"{folder}/{learner}.qfd", sum(sizes)) for learner in range(learners)]
    clock = processor = float("inf")
    with torch.inference_mode():
        for _ in range(rounds):
            start, before = time.perf_counter(), time.process_time()
            merged = merge(payloads, sizes, rda)[0]
            clock = min(clock, time.perf_counter() - start)
            processor = min(processor, (time.process_time() - before) / threads)
    merged.numpy().tofile(f"{folder}/merged.f32")
    print(clock, processor, torch.__version__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main()
