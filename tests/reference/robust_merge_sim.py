#!/usr/bin/env python3
"""Toy simulation of robust rules for merging outer gradients (pseudo-gradients).

The default run prints a table: for several attacks, how well each merge rule recovers the true direction.  Every entry is

    cosine(merged vector, true direction) / norm of the merged vector

Model: M learners, dimension d.  An honest learner sends R * (sqrt(c) * s + sqrt(1 - c) * noise), where s is the true
direction, the noise is a unit vector orthogonal to s and log R ~ N(0, 0.2^2), so two honest vectors have an expected
cosine of c.  f of the M learners attack.  Honest vectors are isotropic apart from s: there are no non-IID clusters and
no label poisoning, so the table ranks rules, it does not predict losses.  One random draw per cell.

Other experiments (--experiment):
  adaptive  25 of 100 colluders who hide by diluting their common direction with noise
  tokens    one attacker who inflates its token claim, weights tokens^2/steps and linear, with and without the cap
  topk      top-64/4096 payloads: which rules still work on sparse vectors
  all       the table, then the three above

Needs Python 3.9+ and numpy.  The default run takes about 10 s on two cores and about 300 MB of memory.
"""
import argparse

import numpy as np

MAD_TO_SIGMA = 1.4826  # median absolute deviation -> standard deviation of a normal distribution


def unit(x):
    """Scale the vectors along the last axis to norm 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def weighted_median(values, weights):
    """Weighted median; at an exact tie of the two halves, the mean of the two middle values."""
    order = np.argsort(values)
    v, cum = values[order], np.cumsum(weights[order])
    half = cum[-1] / 2
    i = int(np.searchsorted(cum, half * (1 - 1e-12)))
    if abs(cum[i] - half) <= 1e-9 * cum[-1] and i + 1 < len(v):
        return (v[i] + v[i + 1]) / 2
    return v[i]


# ---------------------------------------------------------------- honest learners and attacks

class Swarm:
    """Draws the vectors of one merge round."""

    def __init__(self, seed, dim, learners):
        self.rng = np.random.default_rng(seed)
        self.dim, self.m = dim, learners

    def true_direction(self):
        return unit(self.rng.standard_normal(self.dim))

    def noise(self, n):
        return unit(self.rng.standard_normal((n, self.dim)))

    def honest(self, n, c, s):
        nz = self.noise(n)
        nz = unit(nz - (nz @ s)[:, None] * s)
        radius = np.exp(0.2 * self.rng.standard_normal(n))
        return radius[:, None] * (np.sqrt(c) * s + np.sqrt(1 - c) * nz)

    def attack(self, kind, f, honest):
        """The f vectors of the attackers, who know all honest vectors."""
        if f == 0:
            return np.zeros((0, self.dim))
        r = np.median(np.linalg.norm(honest, axis=1))
        mean, std = honest.mean(0), honest.std(0)
        if kind == "flip10":            # sign flip, ten times the norm
            return -10 * honest[:f]
        if kind == "norm100":           # right direction, hundred times the norm
            return 100 * honest[:f]
        if kind == "collude-mean":      # identical vectors against the honest mean
            return np.repeat((-r * unit(mean))[None], f, 0)
        if kind == "collude-jitter":    # the same, mixed with noise down to a pairwise cosine of 0.5
            return r * (np.sqrt(0.5) * (-unit(mean)) + np.sqrt(0.5) * self.noise(f))
        if kind == "collude-random":    # identical vectors in a random direction
            return np.repeat((r * unit(self.rng.standard_normal(self.dim)))[None], f, 0)
        if kind == "alie":              # "a little is enough": mean - z * std per coordinate, z = 1
            return np.repeat((mean - std)[None], f, 0)
        raise ValueError(f"unknown attack {kind!r}")


# ---------------------------------------------------------------- merge rules: (vectors X, weights w) -> vector

def mean(X, w):
    return (w[:, None] * X).sum(0) / w.sum()


def clip_median(X, w):
    """Mean after clipping every vector to the median norm."""
    n = np.linalg.norm(X, axis=1)
    return mean(X * np.minimum(1, np.median(n) / n)[:, None], w)


def rda(X, w):
    """Radial-directional averaging: weighted mean norm times the unit vector of the weighted mean direction."""
    n = np.linalg.norm(X, axis=1)
    return (w * n).sum() / w.sum() * unit(mean(X / n[:, None], w))


def rda_median(X, w):
    """RDA with the weighted median norm as radius."""
    n = np.linalg.norm(X, axis=1)
    return weighted_median(n, w) * unit(mean(X / n[:, None], w))


def mutual_cosine_filter(X, neighbours=5, mads=6.0):
    """Keep mask: drop learners that are too close to their nearest peers (colluders, copies)."""
    u = unit(X)
    g = u @ u.T
    np.fill_diagonal(g, -2)
    near = np.sort(g, axis=1)[:, -neighbours:].mean(1)
    med = np.median(near)
    mad = np.median(np.abs(near - med)) + 1e-9
    return near <= med + mads * MAD_TO_SIGMA * mad


def leave_one_out_filter(X, mads=5.0):
    """Keep mask: drop learners whose cosine to the mean direction of all others is far below the median."""
    u = unit(X)
    total = u.sum(0)
    rest = total - u
    c = (u * rest).sum(1) / np.linalg.norm(rest, axis=1)
    med = np.median(c)
    mad = np.median(np.abs(c - med)) + 1e-9
    return c >= med - mads * MAD_TO_SIGMA * mad


def filtered_rda_median(X, w):
    """Mutual-cosine filter, leave-one-out filter, then RDA with median radius (the proposed merge).

    The production rule merges nothing and raises an alarm where the first filter would drop more than half; here the
    filter is then skipped, so that every cell has a value.
    """
    keep = mutual_cosine_filter(X)
    if keep.sum() < 0.5 * len(X):
        keep[:] = True
    X, w = X[keep], w[keep]
    keep = leave_one_out_filter(X)
    return rda_median(X[keep], w[keep])


def coordinate_median(X, w):
    return np.median(X, axis=0)


def trimmed_mean(X, w, share=0.3):
    k = int(share * len(X))
    return np.sort(X, axis=0)[k:len(X) - k].mean(0)


def geometric_median(X, w, iterations=8):
    """Weiszfeld iterations from the coordinate-wise median."""
    z = np.median(X, axis=0)
    for _ in range(iterations):
        a = 1 / np.maximum(np.linalg.norm(X - z, axis=1), 1e-6)
        z = (a[:, None] * X).sum(0) / a.sum()
    return z


def centered_clipping(X, w, iterations=3):
    """Centered clipping from the centre 0, radius = median distance to the centre."""
    v = np.zeros(X.shape[1])
    tau = np.median(np.linalg.norm(X - v, axis=1))
    for _ in range(iterations):
        diff = X - v
        v = v + (diff * np.minimum(1, tau / np.linalg.norm(diff, axis=1))[:, None]).mean(0)
    return v


def krum(X, f, multi=False):
    """Krum, or multi-Krum (mean of the M - f vectors with the best score)."""
    n = (X ** 2).sum(1)
    dist = n[:, None] + n[None] - 2 * X @ X.T
    score = np.sort(dist, axis=1)[:, 1:len(X) - f - 1].sum(1)
    return X[np.argsort(score)[:len(X) - f]].mean(0) if multi else X[score.argmin()]


TABLE_RULES = [
    ("mean", mean), ("clip-median", clip_median), ("RDA", rda), ("RDA+median", rda_median),
    ("geo-median", geometric_median), ("cent. clip", centered_clipping), ("filter+RDA", filtered_rda_median),
]
EXTRA_RULES = [("coord. med.", coordinate_median), ("trim 30%", trimmed_mean)]

# (attack, attackers of 100, row of the table or None); the order fixes the random stream
SCENARIOS = [
    ("none", 0, "no attack"),
    ("flip10", 1, None),
    ("flip10", 10, "10 sign-flip x10"),
    ("norm100", 1, "1 norm x100"),
    ("collude-mean", 1, None),
    ("collude-mean", 10, None),
    ("collude-mean", 25, "25 collude (identical, -mean)"),
    ("collude-jitter", 25, "25 collude, jittered to cos 0.5"),
    ("collude-random", 10, None),
    ("alie", 25, "25 ALIE (z=1)"),
]


def entry(v, s):
    n = np.linalg.norm(v)
    return f"{float(v @ s / n) if n > 0 else 0.0:.2f}/{n:.2f}"


# ---------------------------------------------------------------- experiments

def table(args):
    """The table (or, with --full, every scenario and rule, for --cos and for 0.1 and 0.3)."""
    swarm = Swarm(args.seed, args.dim, args.learners)
    rules = TABLE_RULES + (EXTRA_RULES if args.full else [])
    extra = ["krum", "multi-krum"] if args.full else []
    for c in dict.fromkeys([args.cos] + ([0.1, 0.3] if args.full else [])):
        print(f"honest pairwise cosine {c}; d = {args.dim}, M = {args.learners}; cos(merged, true) / merged norm")
        print("| attack | " + " | ".join([name for name, _ in rules] + extra) + " |")
        print("|---" * (1 + len(rules) + len(extra)) + "|")
        for kind, f, label in SCENARIOS:
            f = round(f * args.learners / 100) if f else 0
            s = swarm.true_direction()
            honest = swarm.honest(args.learners - f, c, s)
            X = np.vstack([honest, swarm.attack(kind, f, honest)])
            if label is None and not args.full:
                continue
            w = np.ones(len(X))
            cells = [entry(rule(X, w), s) for _, rule in rules]
            if args.full:
                cells += [entry(krum(X, max(f, 1)), s), entry(krum(X, max(f, 1), multi=True), s)]
            print(f"| {label or f'{f} {kind}'} | " + " | ".join(cells) + " |", flush=True)
        print()


def adaptive(args):
    """Colluders who put a share p of their energy into the common direction -mean and the rest into noise."""
    swarm = Swarm(args.seed, args.dim, args.learners)
    f = round(0.25 * args.learners)
    print(f"adaptive colluders, {f} of {args.learners}: cosine to the true direction")
    for c in (0.02, 0.1):
        for p in (0.01, 0.03, 0.06, 0.1, 0.2, 0.4):
            s = swarm.true_direction()
            honest = swarm.honest(args.learners - f, c, s)
            direction = unit(honest.mean(0))
            r = np.median(np.linalg.norm(honest, axis=1))
            X = np.vstack([honest, r * (-np.sqrt(p) * direction + np.sqrt(1 - p) * swarm.noise(f))])
            w = np.ones(len(X))
            keep = mutual_cosine_filter(X)
            print(f"honest cos {c:<4} coherent energy {p:<4} RDA {unit(rda(X, w)) @ s:5.2f}  "
                  f"filter + RDA-median {unit(filtered_rda_median(X, w)) @ s:5.2f}  "
                  f"attackers kept {int(keep[-f:].sum())}/{f}  honest dropped {int((~keep[:-f]).sum())}", flush=True)
    print()


def tokens(args):
    """One attacker sends -mean and claims T times its tokens in the same number of steps."""
    swarm = Swarm(args.seed, args.dim, args.learners)
    print(f"token claim inflation, 1 attacker of {args.learners} (honest cos 0.1): weight share, then RDA-median cosine")
    for t in (1, 2, 5, 10):
        s = swarm.true_direction()
        honest = swarm.honest(args.learners - 1, 0.1, s)
        r = np.median(np.linalg.norm(honest, axis=1))
        X = np.vstack([honest, -r * unit(honest.mean(0))[None]])
        out = []
        for name, weight in (("tokens^2/steps", t * t), ("linear", t)):
            w = np.ones(len(X))
            w[-1] = weight
            capped = np.minimum(w, 8 * np.median(w))
            out.append(f"{name}: share {w[-1] / w.sum():.3f} cos {unit(rda_median(X, w)) @ s:6.3f}, "
                       f"capped at 8x median {unit(rda_median(X, capped)) @ s:6.3f}")
        print(f"claim x{t:<3}" + "   ".join(out), flush=True)
    print()


def top_k(v, k=64, chunk=4096):
    """Keep the k largest magnitudes of every chunk."""
    out = np.zeros_like(v)
    for i in range(0, len(v), chunk):
        block = v[i:i + chunk]
        j = np.argpartition(-np.abs(block), k)[:k]
        out[i:i + chunk][j] = block[j]
    return out


def topk(args):
    """Sparse payloads without error feedback, no attack."""
    swarm = Swarm(args.seed, args.dim, args.learners)
    s = swarm.true_direction()
    dense = swarm.honest(args.learners, 0.1, s)
    sparse = np.array([top_k(v) for v in dense])
    w = np.ones(len(dense))
    count = (sparse != 0).sum(0)
    print(f"top-64/4096 payloads (honest cos 0.1): union density {(count > 0).mean():.3f}, "
          f"contributors per sent coordinate {count[count > 0].mean():.2f}; cos / norm")
    for name, v in (
        ("dense mean", dense.mean(0)),
        ("sparse mean over all learners", sparse.mean(0)),
        ("sparse mean over the contributors", np.where(count > 0, sparse.sum(0) / np.maximum(count, 1), 0)),
        ("coordinate-wise median", coordinate_median(sparse, w)),
        ("30 % trimmed mean", trimmed_mean(sparse, w)),
        ("RDA", rda(sparse, w)),
    ):
        n = np.linalg.norm(v)
        print(f"  {name:36s}{float(v @ s / n) if n > 0 else 0.0:6.2f} / {n:.3f}", flush=True)
    print()


def main():
    doc = __doc__.split("\n\n")
    p = argparse.ArgumentParser(description=doc[0], epilog="See the docstring for the model and the experiments.")
    p.add_argument("--experiment", choices=("table", "adaptive", "tokens", "topk", "all"), default="table")
    p.add_argument("--full", action="store_true",
                   help="table: all scenarios and rules (adds coordinate median, trimmed mean, Krum, multi-Krum), "
                        "also for honest cosines 0.1 and 0.3 (about 1 min)")
    p.add_argument("--cos", type=float, default=0.02, help="expected cosine of two honest vectors (default 0.02)")
    p.add_argument("--dim", type=int, default=32768, help="dimension (default 32768)")
    p.add_argument("--learners", type=int, default=100, help="learners M; attacker counts scale with it (default 100)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    experiments = {"table": table, "adaptive": adaptive, "tokens": tokens, "topk": topk}
    for name in experiments if args.experiment == "all" else [args.experiment]:
        experiments[name](args)


if __name__ == "__main__":
    main()
