#!/usr/bin/env python3
"""The robust merge of one fragment in PyTorch on the CPU: the yardstick of `cargo bench -p quasar-fragments`.

    pytorch_merge.py FOLDER CODEC LEARNERS THREADS ROUNDS

FOLDER holds the payloads 0.qfd, 1.qfd ... (64 bytes of header, then the values in CODEC, bf16 or int4) and units.txt, one merge unit a
line: its elements and `rda` or `mean`.  The same steps as ours: norms per unit, clip to 1.5 medians, mutual cosines of the clipped
contributions, leave-one-out cosines, radial-directional average with the median norm or mean, cosines to the result.  The payloads
are in memory before the clock starts, one contribution is widened at a time, units are views: it is written to be fast.  Payloads in
int4 are decoded first, once, which belongs to the time.

Writes the result to merged.f32 and prints `merge`, the best time in seconds by the clock and by processor time of a thread, the
version of PyTorch and the peak memory in MiB.  Before it, in the same form, a line each for `encode`, `decode` and `norms` of one
payload.
"""
import resource
import sys
import time

import torch

HEADER_BYTES = 64
NORM_CLIP, NORM_REJECT = 1.5, 10.0


BLOCK, BLOCK_BYTES = 256, 132


class Bf16:
    @staticmethod
    def load(path, sizes):
        elements = sum(sizes)
        return torch.from_file(path, shared=False, size=elements + HEADER_BYTES // 2, dtype=torch.bfloat16)[HEADER_BYTES // 2:].clone()

    @staticmethod
    def widen(payload, sizes):
        return payload  # The merge works on bf16 as it is.

    @staticmethod
    def decode(payload, sizes, out):
        out.copy_(payload)

    @staticmethod
    def encode(values, sizes, out):
        out.copy_(values)
        assert bool(torch.isfinite(out).all())


class Int4:
    """Units of blocks of 256: an f32 scale, then low and high halves of 128 bytes.  A last block may be shorter."""

    @staticmethod
    def bytes_of(size):
        rest = size % BLOCK
        return size // BLOCK * BLOCK_BYTES + (4 + (rest + 1) // 2 if rest else 0)

    @classmethod
    def load(cls, path, sizes):
        length = HEADER_BYTES + sum(map(cls.bytes_of, sizes))
        return torch.from_file(path, shared=False, size=length, dtype=torch.uint8)[HEADER_BYTES:].clone()

    @classmethod
    def widen(cls, payload, sizes):
        out = torch.empty(sum(sizes))
        cls.decode(payload, sizes, out)
        return out

    @classmethod
    def blocks(cls, sizes, payload, values):
        """Pairs of views: bytes [blocks, bytes of one] and values [blocks, elements of one]."""
        for size, part, unit in zip(sizes, payload.split([cls.bytes_of(size) for size in sizes]), values.split(sizes)):
            whole = size // BLOCK
            if whole:
                yield part[:whole * BLOCK_BYTES].view(whole, BLOCK_BYTES), unit[:whole * BLOCK].view(whole, BLOCK)
            if size % BLOCK:
                yield part[whole * BLOCK_BYTES:].view(1, -1), unit[whole * BLOCK:].view(1, -1)

    @classmethod
    def decode(cls, payload, sizes, out):
        for block, values in cls.blocks(sizes, payload, out):
            scale, codes = block[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32), block[:, 4:]
            first = codes.shape[1]
            torch.mul(codes & 15, scale, out=values[:, :first])
            torch.mul((codes >> 4)[:, :values.shape[1] - first], scale, out=values[:, first:])
            values.sub_(8 * scale)

    @classmethod
    def encode(cls, values, sizes, out):
        for block, values in cls.blocks(sizes, out, values):
            largest = values.abs().amax(1, keepdim=True)
            assert bool(torch.isfinite(largest).all())
            codes = (values * (7 / largest)).round_().add_(8).to(torch.uint8)
            first = block.shape[1] - 4
            block[:, :4] = (largest / 7).view(torch.uint8)
            block[:, 4:] = codes[:, :first]
            block[:, 4:4 + codes.shape[1] - first] |= codes[:, first:] << 4


def norms_of(payload, sizes):
    return torch.stack([torch.linalg.vector_norm(unit, dtype=torch.float32) for unit in payload.split(sizes)])


def merge(payloads, sizes, rda):
    learners = len(payloads)
    norms = torch.stack([norms_of(payload, sizes) for payload in payloads])
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
    folder, codec = sys.argv[1], {"bf16": Bf16, "int4": Int4}[sys.argv[2]]
    learners, threads, rounds = map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    units = [line.split() for line in open(f"{folder}/units.txt")]
    sizes, rda = [int(size) for size, _ in units], [rule == "rda" for _, rule in units]
    payloads = [codec.load(f"{folder}/{learner}.qfd", sizes) for learner in range(learners)]

    def best(name, work):
        clock = processor = float("inf")
        for _ in range(rounds):
            start, before = time.perf_counter(), time.process_time()
            work()
            clock = min(clock, time.perf_counter() - start)
            processor = min(processor, (time.process_time() - before) / threads)
        print(name, clock, processor, torch.__version__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)

    with torch.inference_mode():
        values, encoded, merged = torch.empty(sum(sizes)), torch.zeros_like(payloads[0]), []
        codec.decode(payloads[0], sizes, values)
        best("encode", lambda: codec.encode(values, sizes, encoded))
        best("decode", lambda: codec.decode(payloads[0], sizes, values))
        best("norms", lambda: norms_of(codec.widen(payloads[0], sizes), sizes))
        best("merge", lambda: merged.__setitem__(slice(None), merge([codec.widen(payload, sizes) for payload in payloads], sizes, rda)[:1]))
    merged[0].numpy().tofile(f"{folder}/merged.f32")


if __name__ == "__main__":
    main()
