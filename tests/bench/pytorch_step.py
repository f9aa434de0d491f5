#!/usr/bin/env python3
"""The training step of a learner in plain PyTorch, to compare speeds with: forward, backward, clipping, AdamW, in fp32.

`cargo xtask bench learning` starts this, and lets it and our own trainer take turns on the same model and the same tokens.
The three linear-attention branches are in chunked (matrix) form, experts get their tokens sorted, AdamW is PyTorch's fused
one: what somebody would write who cares about speed and stays inside PyTorch. One thread.

    python3 pytorch_step.py --checkpoint DIR --tokens FILE --rows 4 --row-tokens 128
FILE holds the batches one after the other, tokens as little-endian u32. The first line on standard output is
{"torch": VERSION}, or {"unavailable": REASON}. Then each line on standard input, a learning rate, is answered by one step:
{"seconds": S, "loss": L}. Needs torch alone.

Shapes: B rows, T tokens, N = B*T, D hidden size, H heads, d head width, M Raven slots, C chunk, E experts, K experts a token.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
except Exception as error:  # an installation can be broken in many ways; each is a reason to skip
    print(json.dumps({"unavailable": f"{type(error).__name__}: {error}"}), flush=True)
    sys.exit(0)

RAVEN_OUTPUT_EPS = 1e-5
SINGLE_CHUNK, CHUNK, SLOT_CHUNK = 128, 64, 16
BUFFERS = (".expert_bias", ".slope", ".inv_freq")
# Not trained in the reference.
FROZEN = (".quasar_attention.A_log", ".quasar_attention.dt_bias")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


# ---------------------------------------------------------------- chunked recurrences

def chunks(x, size):
    """[B, H, T, *] -> [B, H, T/C, C, *], zeros behind the last token."""
    missing = -x.shape[2] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, size))


def joined(outputs, tokens):
    return torch.cat(outputs, dim=2)[:, :, :tokens]


def delta_rule(q, k, v, beta, size):
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T;  o_t = d^-1/2 S_t^T q_t."""
    tokens, width = k.shape[2:]
    q, k, v, beta = chunks(q * width ** -0.5, size), chunks(k, size), chunks(v, size), chunks(beta[..., None], size)
    k_beta = k * beta
    # With unitriangular set the solver takes the diagonal as 1 and reads the strictly lower part only.
    system, scores = k_beta @ k.mT, (q @ k.mT).tril()
    if q.shape[2] == 1:
        fresh = torch.linalg.solve_triangular(system, v * beta, upper=False, unitriangular=True)
        return joined([(scores @ fresh)[:, :, 0]], tokens)
    solved = torch.linalg.solve_triangular(system, torch.cat([k_beta, v * beta], -1), upper=False, unitriangular=True)
    w, u = solved.split([width, v.shape[-1]], dim=-1)
    state, outputs = None, []
    for n in range(q.shape[2]):
        fresh = u[:, :, n] if state is None else u[:, :, n] - w[:, :, n] @ state
        inside = scores[:, :, n] @ fresh
        outputs.append(inside if state is None else inside + q[:, :, n] @ state)
        added = k[:, :, n].mT @ fresh
        state = added if state is None else state + added
    return joined(outputs, tokens)


def constant_decay(q, k, v, slope, size):
    """S_t = e^g S_{t-1} + k_t v_t^T;  o_t = d^-1/2 q_t^T S_t, one g <= 0 for each head."""
    tokens, width = k.shape[2:]
    q, k, v = chunks(q * width ** -0.5, size), chunks(k, size), chunks(v, size)
    at, g = torch.arange(size, dtype=q.dtype), slope[:, None, None]
    between = ((at[:, None] - at).clamp(min=0) * g).exp().tril()                              # [H, C, C]
    inside = (q @ k.mT * between[:, None]) @ v
    since_start, until_end = ((at[:, None] + 1) * g).exp(), ((size - 1 - at[:, None]) * g).exp()
    state, outputs = None, []
    for n in range(q.shape[2]):
        outputs.append(inside[:, :, n] if state is None else inside[:, :, n] + (q[:, :, n] * since_start) @ state)
        if n + 1 < q.shape[2]:
            added = (k[:, :, n] * until_end).mT @ v[:, :, n]
            state = added if state is None else (size * g).exp() * state + added
    return joined(outputs, tokens)


def slots(q, k, v, log_decay, write, size):
    """Key memory [d, M] and value memory [M, d], decayed by e^F per slot; softmax over the slots in between."""
    tokens = k.shape[2]
    q, k, v, write = chunks(q, size), chunks(k, size), chunks(v, size), chunks(write, size)
    summed = chunks(log_decay, size).cumsum(dim=3)                                            # b: [B, H, chunks, C, M]
    future = torch.ones(size, size, dtype=torch.bool).triu(1)[..., None]
    # [B, H, chunks, t, i, M]: s_i e^{b_t - b_i} for i <= t. The difference is taken before exp: e^{-b_i} would overflow.
    pair = (summed[..., :, None, :] - summed[..., None, :, :]).masked_fill(future, float("-inf")).exp() * write[..., None, :, :]
    inside = ((q @ k.mT)[..., None, :] @ pair).squeeze(-2)                                    # [B, H, chunks, t, M]
    end = summed[..., -1:, :]
    left, keep, grown = write * (end - summed).exp(), end.exp(), summed.exp()
    new_keys, new_values = k.mT @ left, left.mT @ v
    keys, values, outputs = None, None, []
    for n in range(q.shape[2]):
        logits = inside[:, :, n] if keys is None else inside[:, :, n] + (q[:, :, n] @ keys) * grown[:, :, n]
        p = logits.softmax(-1)
        out = (pair[:, :, n] @ p[..., None]).squeeze(-1) @ v[:, :, n]
        outputs.append(out if keys is None else out + (p * grown[:, :, n]) @ values)
        keys = new_keys[:, :, n] if keys is None else keys * keep[:, :, n] + new_keys[:, :, n]
        values = new_values[:, :, n] if values is None else values * keep[:, :, n].mT + new_values[:, :, n]
    return joined(outputs, tokens)


# ---------------------------------------------------------------- the model

def unit_rms(x, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class Quasar:
    """The forward pass over tensors by their names in the checkpoint."""

    def __init__(self, config, weights, tokens):
        self.config, self.weights, self.eps = config, weights, config["rms_norm_eps"]
        self.heads, self.kv_heads, self.d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        hybrid, cycle = sorted(config["hybrid_attention_layers"]), config["hybrid_layerwise_cycle"]
        self.branches = {layer: cycle[at % len(cycle)] for at, layer in enumerate(hybrid)}
        self.chunk = tokens if tokens <= SINGLE_CHUNK else CHUNK
        width = int(self.d * config["partial_rotary_factor"])
        position = torch.arange(tokens)
        angle = torch.outer(position.float(), 1.0 / config["rope_theta"] ** (torch.arange(0, width, 2).float() / width))
        if config["use_nope"]:
            angle = angle * (position < config["nope_after_position"])[:, None]
        self.cos, self.sin = angle.cos()[:, None], angle.sin()[:, None]                       # [T, 1, r/2]

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"])

    def norm(self, x, name, eps=None):
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.eps if eps is None else eps)

    def swiglu(self, x, prefix):
        gate, up = self.linear(x, prefix + "gate_proj"), self.linear(x, prefix + "up_proj")
        return self.linear(F.silu(gate) * up, prefix + "down_proj")

    def rope(self, x):
        half = self.cos.shape[-1]
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin, rest], dim=-1)

    def repeated(self, x):
        """Each key-value head for its query heads, heads before tokens: [B, H, T, d]."""
        return x.repeat_interleave(self.heads // self.kv_heads, dim=2).transpose(1, 2)

    def qkv(self, x, prefix):
        y = self.linear(x, prefix + "query_key_value").unflatten(-1, (-1, self.d))
        q, k, v = y.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = self.rope(self.norm(q, prefix + "query_layernorm")), self.rope(self.norm(k, prefix + "key_layernorm"))
        return q.transpose(1, 2), self.repeated(k), self.repeated(v)

    def gqa(self, x, prefix):
        out = F.scaled_dot_product_attention(*self.qkv(x, prefix), is_causal=True)
        return self.linear(out.transpose(1, 2).flatten(2), prefix + "dense")

    def raven(self, x, prefix):
        project = lambda name, heads: self.linear(x, f"{prefix}{name}_proj").unflatten(-1, (heads, -1))
        q = self.norm(F.silu(project("q", self.heads)), prefix + "q_norm").transpose(1, 2)
        k = self.repeated(self.norm(F.silu(project("k", self.kv_heads)), prefix + "k_norm"))
        v = self.repeated(F.silu(project("v", self.kv_heads)))
        step = F.softplus(project("a", self.heads).squeeze(-1) + self.weights[prefix + "dt_bias"])
        head_decay = -self.weights[prefix + "A_log"].exp() * step                             # [B, T, H]
        score = torch.sigmoid(project("r", self.heads))                                       # [B, T, H, M]
        best, where = score.topk(self.config["hybrid_raven_topk"], dim=-1)
        share = torch.zeros_like(score).scatter(-1, where, best / (best.sum(-1, keepdim=True) + 1e-9))
        log_decay = (head_decay[..., None] * share).transpose(1, 2)
        out = slots(q, k, v, log_decay, 1 - log_decay.exp(), min(x.shape[1], SLOT_CHUNK)).transpose(1, 2).flatten(2)
        return self.linear(self.norm(F.silu(out), prefix + "g_norm", RAVEN_OUTPUT_EPS), prefix + "o_proj")

    def gla(self, x, prefix):
        out = constant_decay(*self.qkv(x, prefix), self.weights[prefix + "slope"], self.chunk).transpose(1, 2)
        out = unit_rms(out, self.eps).flatten(2) * self.weights[prefix + "g_norm.weight"]
        return self.linear(out * torch.sigmoid(self.linear(x, prefix + "g_proj")), prefix + "dense")

    def quasar(self, x, prefix):
        weights = self.weights
        h = unit_rms(x.nan_to_num(0.0, 60.0, -60.0).clamp(-60.0, 60.0), 1e-6)
        project = lambda name: F.silu(self.linear(h, f"{prefix}{name}_proj")).unflatten(-1, (self.heads, self.d))
        q, k, v = F.normalize(project("q"), dim=-1), F.normalize(project("k"), dim=-1), project("v")
        b = torch.sigmoid(self.linear(h, prefix + "b_proj"))
        n = k.square().sum(-1, keepdim=True).clamp(0.1, 10.0)
        rate = weights[prefix + "A_log"].exp()[:, None] * F.softplus(b[..., None] + weights[prefix + "dt_bias"].view(self.heads, self.d))
        beta = ((1 - (-rate).exp()) / (n + 1e-6)).mean(-1).clamp(1e-4, 0.95)
        out = delta_rule(*(t.transpose(1, 2) for t in (q, k, v, beta)), self.chunk).transpose(1, 2)
        out = out.nan_to_num(0.0, 1e4, -1e4).clamp(-1e4, 1e4)
        gate = F.linear(self.linear(h, prefix + "g_proj.0"), weights[prefix + "g_proj.1.weight"], weights[prefix + "g_proj.1.bias"])
        gate = torch.sigmoid(gate.clamp(-30.0, 30.0)).unflatten(-1, (self.heads, self.d))
        out = unit_rms(out, self.eps) * weights[prefix + "o_norm.weight"].clamp(0.0, 4.0) * gate
        return self.linear(out.flatten(2), prefix + "o_proj")

    def attention(self, x, prefix, layer):
        out, weights = self.gqa(x, prefix), self.weights
        branch = self.branches.get(layer)
        if branch is None:
            return out
        y = getattr(self, branch)(x, f"{prefix}{branch}_attention.")
        gain = weights[prefix + "branch_output_gain"]
        y = y * (gain * (weights[prefix + "branch_global_output_gain"] / gain.clamp(min=1e-6)) * weights[prefix + "branch_output_channel_gain"])
        y = y + self.linear(self.linear(y, prefix + "branch_output_adapter_down"), prefix + "branch_output_adapter_up")
        return out + torch.sigmoid(weights[prefix + "replace_alpha_raw"]) * y

    def choose(self, score, bias):
        """The best experts [N, K] by score plus bias inside the best groups."""
        config = self.config
        ranking = (score + bias).unflatten(-1, (config["n_group"], -1))
        group_score = ranking.topk(2, dim=-1).values.sum(-1)
        best = group_score.topk(config["topk_group"], dim=-1).indices
        closed = torch.ones_like(group_score, dtype=torch.bool).scatter(1, best, False)
        return ranking.masked_fill(closed[..., None], float("-inf")).flatten(1).topk(config["num_experts_per_tok"], dim=-1).indices

    def moe(self, x, prefix):
        config, weights = self.config, self.weights
        flat = x.flatten(0, 1)
        score = torch.sigmoid(self.linear(flat, prefix + "gate"))
        with torch.no_grad():
            experts = self.choose(score, weights[prefix + "gate.expert_bias"])
            chosen, order = experts.flatten().sort(stable=True)                               # assignments by expert
            counts = torch.bincount(chosen, minlength=config["num_experts"]).tolist()
            token = order // config["num_experts_per_tok"]
        share = score.gather(1, experts)
        share = share / (share.sum(-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]
        parts = []
        for part, w12, w3 in zip(flat[token].split(counts), weights[prefix + "experts_w12"], weights[prefix + "experts_w3"]):
            gate, up = (part @ w12).chunk(2, dim=-1)
            parts.append((F.silu(gate) * up) @ w3)
        outer = torch.cat(parts) * share.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, token, outer).view_as(x) + self.swiglu(x, prefix + "shared_experts.")

    def loss(self, ids):
        config = self.config
        x = F.embedding(ids, self.weights["model.word_embeddings.weight"], padding_idx=config.get("pad_token_id"))
        for layer in list(range(config["num_hidden_layers"])) * config["num_loops"]:
            prefix = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "input_layernorm"), prefix + "attention.", layer)
            h = self.norm(x, prefix + "post_attention_layernorm")
            x = x + (self.swiglu if layer < config["first_k_dense_replace"] else self.moe)(h, prefix + "mlp.")
        logits = self.linear(self.norm(x[:, :-1], "model.norm"), "lm_head")
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


# ---------------------------------------------------------------- files and steps

def load(file):
    """The tensors of a safetensors file in fp32: length of the header, header in JSON, data."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, count = start + entry["data_offsets"][0], math.prod(entry["shape"])
        tensor = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]], count=count, offset=begin)
        tensors[name] = tensor.view(entry["shape"]).float().clone()
    return tensors


def main():
    parser = argparse.ArgumentParser(description="Training steps in plain PyTorch, one for each line of standard input.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--row-tokens", type=int, required=True)
    parser.add_argument("--beta1", type=float, default=0.9)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--clip-norm", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    config = json.loads((arguments.checkpoint / "config.json").read_text())
    weights = load(arguments.checkpoint / "model.safetensors")
    trained = [weight.requires_grad_() for name, weight in weights.items() if not name.endswith(BUFFERS + FROZEN)]
    groups = [{"params": [w for w in trained if w.ndim > 1], "weight_decay": arguments.weight_decay},
              {"params": [w for w in trained if w.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(arguments.beta1, arguments.beta2), eps=arguments.eps, fused=True)
    tokens = torch.frombuffer(bytearray(arguments.tokens.read_bytes()), dtype=torch.int32).long()
    batches = tokens.view(-1, arguments.rows, arguments.row_tokens)
    model = Quasar(config, weights, arguments.row_tokens)
    print(json.dumps({"torch": torch.__version__}), flush=True)

    for number, line in enumerate(sys.stdin):
        for group in optimizer.param_groups:
            group["lr"] = float(line)
        start = time.perf_counter()
        loss = model.loss(batches[number % len(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, arguments.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": value}), flush=True)


if __name__ == "__main__":
    main()
