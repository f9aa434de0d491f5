#!/usr/bin/env python3
"""Executable specification of Quasar-Preview (`model_type: quasar_long`) in plain PyTorch.

It follows the architecture of Quasar-Preview part by part (the "§" in the comments are the parts), in our own formulation. It is meant to be read
and compared with, not to be fast: every recurrence is a loop over tokens, and the gradients are PyTorch's autograd.

Shapes use these letters:
    B batch   T tokens   N = B*T   D hidden_size   H query heads   KV key/value heads   d head_dim
    M Raven slots   E experts   I expert width   r rotary width   V vocabulary

`weights` is a dict from the checkpoint's tensor names to tensors, `config` the dict of config.json.
Precision: parts that the published model computes in fp32 go through `wide`, which keeps fp64 as fp64. So the same code
is the bf16/fp32 forward and, with fp64 weights, a high-precision one (only the RoPE tables stay fp32, as constants).

    python quasar_spec.py GOLDEN_DIR                      compare with the golden vectors, layer by layer
    python quasar_spec.py GOLDEN_DIR --grads              and with golden_grads.safetensors
    python quasar_spec.py GOLDEN_DIR --float64 --grads    the same, computed in fp64
    python quasar_spec.py GOLDEN_DIR --finite-differences 5   check autograd by central differences in fp64
    python quasar_spec.py GOLDEN_DIR --write-grads FILE   make golden_grads.safetensors (fp32)
Needs torch and safetensors; runs on the CPU in seconds.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RAVEN_OUTPUT_EPS = 1e-5  # not rms_norm_eps: part §5.3
BUFFER_SUFFIXES = (".expert_bias", ".slope", ".inv_freq")


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where the input is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis; statistics in fp32, the result in x's dtype."""
    y = wide(x)
    return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (weight * unit_rms(x, eps)).to(x.dtype)


def swiglu(x: Tensor, weights: dict, prefix: str) -> Tensor:
    gate = F.linear(x, weights[prefix + "gate_proj.weight"])
    up = F.linear(x, weights[prefix + "up_proj.weight"])
    return F.linear(F.silu(gate) * up, weights[prefix + "down_proj.weight"])


# ---------------------------------------------------------------- §5.0 RoPE with the NoPE cut

def rope_tables(tokens: int, config: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, r]; the identity from position nope_after_position on."""
    width = int(config["head_dim"] * config["partial_rotary_factor"])
    position = torch.arange(tokens)
    frequency = 1.0 / config["rope_theta"] ** (torch.arange(0, width, 2).float() / width)     # [r/2]
    angle = torch.outer(position.float(), frequency).repeat(1, 2)                             # [T, r]
    if config["use_nope"]:
        angle = angle * (position < config["nope_after_position"])[:, None]                   # angle 0: cos 1, sin 0
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, d]. Channel j turns with channel j + r/2 inside the first r channels."""
    half = cos.shape[-1] // 2
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    c, s = cos[:, None, :half], sin[:, None, :half]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)


# ---------------------------------------------------------------- §5.1 GQA

def fused_qkv(x: Tensor, weights: dict, prefix: str, config: dict, rope: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each [B, T, H, d]: head norm, then RoPE, then each KV head repeated for its H/KV query heads."""
    batch, tokens, _ = x.shape
    heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    y = F.linear(x, weights[prefix + "query_key_value.weight"]).view(batch, tokens, heads + 2 * kv_heads, d)
    q, k, v = y.split([heads, kv_heads, kv_heads], dim=2)
    q = apply_rope(rms_norm(q, weights[prefix + "query_layernorm.weight"], config["rms_norm_eps"]), *rope)
    k = apply_rope(rms_norm(k, weights[prefix + "key_layernorm.weight"], config["rms_norm_eps"]), *rope)
    group = heads // kv_heads
    return q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)


def gqa(x: Tensor, weights: dict, prefix: str, config: dict, rope: tuple) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in fused_qkv(x, weights, prefix, config, rope))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)             # [B, T, H, d]
    return F.linear(out.flatten(2), weights[prefix + "dense.weight"])


# ---------------------------------------------------------------- §5.3 Raven

def raven(x: Tensor, weights: dict, prefix: str, config: dict) -> Tensor:
    batch, tokens, width = x.shape
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    slots, kept = config["hybrid_raven_slots"], config["hybrid_raven_topk"]
    d, eps = width // heads, config["rms_norm_eps"]

    def project(name: str, n: int) -> Tensor:
        return F.linear(x, weights[f"{prefix}{name}_proj.weight"]).view(batch, tokens, n, -1)

    q = rms_norm(F.silu(project("q", heads)), weights[prefix + "q_norm.weight"], eps)
    k = rms_norm(F.silu(project("k", kv_heads)), weights[prefix + "k_norm.weight"], eps)
    v = F.silu(project("v", kv_heads))

    # decay of the head, shared out over the slots that the router picks
    step = F.softplus(wide(project("a", heads).squeeze(-1)) + wide(weights[prefix + "dt_bias"]))
    head_decay = -wide(weights[prefix + "A_log"]).exp() * step                                # [B, T, H], <= 0
    score = torch.sigmoid(project("r", heads))                                                # [B, T, H, M]
    best, where = score.topk(kept, dim=-1)
    share = torch.zeros_like(score).scatter(-1, where, best / (best.sum(-1, keepdim=True) + 1e-9))
    log_decay = (head_decay[..., None] * share).to(q.dtype)                                   # [B, T, H, M]
    write = (1 - log_decay.exp()).to(q.dtype)                                                 # 0 for unpicked slots

    group = heads // kv_heads
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v, log_decay, write = (wide(t) for t in (q, k, v, log_decay, write))
    key_memory = q.new_zeros(batch, heads, d, slots)
    value_memory = q.new_zeros(batch, heads, slots, d)
    outputs = []
    for t in range(tokens):
        keep, s = log_decay[:, t].exp(), write[:, t]                                          # [B, H, M]
        key_memory = key_memory * keep[:, :, None, :] + k[:, t, :, :, None] * s[:, :, None, :]
        value_memory = value_memory * keep[..., None] + s[..., None] * v[:, t, :, None, :]
        p = torch.einsum("bhd,bhdm->bhm", q[:, t], key_memory).softmax(-1)                    # scale 1
        outputs.append(torch.einsum("bhm,bhmd->bhd", p, value_memory))
    out = torch.stack(outputs, dim=1).to(x.dtype).flatten(2)                                  # [B, T, D]
    out = rms_norm(F.silu(out), weights[prefix + "g_norm.weight"], RAVEN_OUTPUT_EPS)
    return F.linear(out, weights[prefix + "o_proj.weight"])


# ---------------------------------------------------------------- §5.4 GLA (constant decay)

def gla(x: Tensor, weights: dict, prefix: str, config: dict, rope: tuple) -> Tensor:
    batch, tokens, _ = x.shape
    heads, d = config["num_attention_heads"], config["head_dim"]
    q, k, v = (wide(t) for t in fused_qkv(x, weights, prefix, config, rope))
    keep = wide(weights[prefix + "slope"].to(x.dtype)).exp()[:, None, None]                   # [H, 1, 1]
    state = q.new_zeros(batch, heads, d, d)
    outputs = []
    for t in range(tokens):
        state = keep * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * d ** -0.5)
    out = torch.stack(outputs, dim=1).to(x.dtype)                                             # [B, T, H, d]
    out = unit_rms(out, config["rms_norm_eps"]).flatten(2) * weights[prefix + "g_norm.weight"]
    out = out * torch.sigmoid(F.linear(x, weights[prefix + "g_proj.weight"]))
    return F.linear(out, weights[prefix + "dense.weight"])


# ---------------------------------------------------------------- §5.5 Quasar (delta rule, adaptive step)

def quasar_step_size(k: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """k [B, T, H, d] normalised, b [B, T, H] in (0, 1); the step size [B, T, H] in fp32."""
    heads, d = k.shape[2:]
    n = wide(k).square().sum(-1, keepdim=True).clamp(0.1, 10.0)                               # [B, T, H, 1]
    rate = wide(a_log).exp()[:, None] * F.softplus(wide(b)[..., None] + wide(dt_bias).view(heads, d))
    return ((1 - (-rate).exp()) / (n + 1e-6)).mean(-1).clamp(1e-4, 0.95)


def quasar(x: Tensor, weights: dict, prefix: str, config: dict) -> Tensor:
    batch, tokens, _ = x.shape
    heads, d = config["num_attention_heads"], config["head_dim"]
    h = unit_rms(wide(x).nan_to_num(0.0, 60.0, -60.0).clamp(-60.0, 60.0), 1e-6).to(x.dtype)   # all projections read h

    def project(name: str) -> Tensor:
        return F.silu(F.linear(h, weights[f"{prefix}{name}_proj.weight"])).view(batch, tokens, heads, d)

    q, k, v = F.normalize(project("q"), dim=-1), F.normalize(project("k"), dim=-1), project("v")
    b = torch.sigmoid(F.linear(h, weights[prefix + "b_proj.weight"]))
    beta = quasar_step_size(k, b, weights[prefix + "A_log"], weights[prefix + "dt_bias"]).to(q.dtype)

    q, k, v32, beta = (wide(t) for t in (q, k, v, beta))
    state = q.new_zeros(batch, heads, d, d)                                                   # key x value
    outputs = []
    for t in range(tokens):
        error = v32[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + (beta[:, t, :, None] * k[:, t])[..., None] * error[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * d ** -0.5)
    out = torch.stack(outputs, dim=1).nan_to_num(0.0, 1e4, -1e4).clamp(-1e4, 1e4).to(v.dtype)

    gate = F.linear(h, weights[prefix + "g_proj.0.weight"])
    gate = F.linear(gate, weights[prefix + "g_proj.1.weight"], weights[prefix + "g_proj.1.bias"])
    gate = torch.sigmoid(wide(gate).clamp(-30.0, 30.0)).to(x.dtype).view(batch, tokens, heads, d)
    out = unit_rms(out, config["rms_norm_eps"]) * weights[prefix + "o_norm.weight"].clamp(0.0, 4.0) * gate
    return F.linear(out.flatten(2), weights[prefix + "o_proj.weight"])


# ---------------------------------------------------------------- §5.2 hybrid wrapper

def branch_of(layer: int, config: dict) -> str | None:
    """'quasar', 'raven', 'gla', or None where the layer has GQA alone (§4)."""
    hybrid, cycle = sorted(config["hybrid_attention_layers"]), config["hybrid_layerwise_cycle"]
    return cycle[hybrid.index(layer) % len(cycle)] if layer in hybrid else None


def attention(x: Tensor, weights: dict, prefix: str, config: dict, layer: int, rope: tuple) -> Tensor:
    out = gqa(x, weights, prefix, config, rope)
    branch = branch_of(layer, config)
    if branch is None:
        return out
    if branch == "quasar":
        y = quasar(x, weights, prefix + "quasar_attention.", config)
    elif branch == "raven":
        y = raven(x, weights, prefix + "raven_attention.", config)
    else:
        y = gla(x, weights, prefix + "gla_attention.", config, rope)
    gain, global_gain = weights[prefix + "branch_output_gain"], weights[prefix + "branch_global_output_gain"]
    y = gain * (global_gain / gain.clamp(min=1e-6) * y)                                       # gain cancels
    y = y * weights[prefix + "branch_output_channel_gain"]
    low_rank = F.linear(y, weights[prefix + "branch_output_adapter_down.weight"])
    y = y + F.linear(low_rank, weights[prefix + "branch_output_adapter_up.weight"])
    return out + torch.sigmoid(weights[prefix + "replace_alpha_raw"]) * y


# ---------------------------------------------------------------- §6 mixture of experts

def route(x: Tensor, weights: dict, prefix: str, config: dict) -> tuple[Tensor, Tensor]:
    """x [N, D] -> the chosen experts [N, K] and their weights [N, K] (in x's dtype)."""
    score = torch.sigmoid(F.linear(wide(x), wide(weights[prefix + "gate.weight"])))           # [N, E]
    ranking = (score + weights[prefix + "gate.expert_bias"]).view(len(x), config["n_group"], -1)
    group_score = ranking.topk(2, dim=-1).values.sum(-1)                                      # [N, groups]
    open_groups = group_score.topk(config["topk_group"], dim=-1).indices
    closed = torch.ones_like(group_score, dtype=torch.bool).scatter(1, open_groups, False)
    ranking = ranking.masked_fill(closed[..., None], float("-inf")).flatten(1)
    experts = ranking.topk(config["num_experts_per_tok"], dim=-1).indices
    share = score.gather(1, experts)                                                          # without the bias
    share = share / (share.sum(-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]
    return experts, share.to(x.dtype)


def moe(x: Tensor, weights: dict, prefix: str, config: dict) -> Tensor:
    flat = x.flatten(0, 1)                                                                    # [N, D]
    experts, share = route(flat, weights, prefix, config)
    w12, w3 = weights[prefix + "experts_w12"], weights[prefix + "experts_w3"]                 # [E, D, 2I], [E, I, D]
    out = torch.zeros_like(flat)
    for expert in experts.unique().tolist():                                                  # no capacity limit
        token, slot = (experts == expert).nonzero(as_tuple=True)
        gate, up = (flat[token] @ w12[expert]).chunk(2, dim=-1)
        out = out.index_add(0, token, share[token, slot, None] * ((F.silu(gate) * up) @ w3[expert]))
    return out.view_as(x) + swiglu(x, weights, prefix + "shared_experts.")


# ---------------------------------------------------------------- §3 whole model, §8 loss

def forward(input_ids: Tensor, weights: dict, config: dict, trace: list | None = None) -> Tensor:
    """input_ids [B, T] -> logits [B, T, V]. `trace` receives hidden.0 .. hidden.L as the golden file names them."""
    eps = config["rms_norm_eps"]
    # padding_idx: the embedding row of the pad token gets no gradient
    x = F.embedding(input_ids, weights["model.word_embeddings.weight"], padding_idx=config["pad_token_id"])
    rope = rope_tables(input_ids.shape[1], config, x.dtype)
    for _ in range(config["num_loops"]):
        for layer in range(config["num_hidden_layers"]):
            if trace is not None:
                trace.append(x)
            prefix = f"model.layers.{layer}."
            h = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
            x = x + attention(h, weights, prefix + "attention.", config, layer, rope)
            h = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
            dense = layer < config["first_k_dense_replace"]
            x = x + (swiglu(h, weights, prefix + "mlp.") if dense else moe(h, weights, prefix + "mlp.", config))
    x = rms_norm(x, weights["model.norm.weight"], eps)
    if trace is not None:
        trace.append(x)
    return F.linear(x, weights["lm_head.weight"])


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of position t's logits against label t+1; labels -100 are left out."""
    return F.cross_entropy(wide(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def loss_and_gradients(input_ids: Tensor, weights: dict, config: dict) -> tuple[Tensor, dict, list]:
    """The loss, d loss / d parameter by HF name, and the names of the parameters that the loss does not depend on."""
    params = {n: w.clone().requires_grad_() for n, w in weights.items() if not n.endswith(BUFFER_SUFFIXES)}
    loss = next_token_loss(forward(input_ids, {**weights, **params}, config), input_ids)
    found = dict(zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True)))
    return loss.detach(), {n: g for n, g in found.items() if g is not None}, [n for n, g in found.items() if g is None]


# ---------------------------------------------------------------- comparison with the golden files

def cancels(name: str) -> bool:
    """branch_output_gain divides out (§5.2): its gradient is rounding noise, to be compared absolutely."""
    return name.endswith(".branch_output_gain")


def compare_gradients(ours: dict, golden: dict) -> None:
    assert ours.keys() == golden.keys(), sorted(ours.keys() ^ golden.keys())
    rows = sorted(((float((ours[n].double() - g.double()).norm() / g.double().norm().clamp(min=1e-30)), n)
                   for n, g in golden.items() if not cancels(n)), reverse=True)
    noise = max(max(float(ours[n].abs().max()), float(golden[n].abs().max())) for n in golden if cancels(n))
    total = [sum(float(g.double().square().sum()) for g in s.values()) ** 0.5 for s in (ours, golden)]
    print(f"gradients  {len(golden)} tensors  norm {total[0]:.9g} (golden {total[1]:.9g})  worst |difference|/|golden|:")
    for error, name in rows[:5]:
        print(f"           {error:.2e}  {name}")
    print(f"           branch_output_gain (cancels): largest absolute value on either side {noise:.1e}")


def check_finite_differences(input_ids: Tensor, weights: dict, config: dict, count: int, seed: int) -> None:
    """Central differences in fp64 at one random entry each of `count` random parameters."""
    weights = {n: w.double() if w.is_floating_point() else w for n, w in weights.items()}
    _, gradients, _ = loss_and_gradients(input_ids, weights, config)
    generator = torch.Generator().manual_seed(seed)
    names = sorted(n for n in gradients if not cancels(n))
    for i in torch.randperm(len(names), generator=generator)[:count].tolist():
        name, gradient = names[i], gradients[names[i]].flatten()
        live = gradient.nonzero().flatten()                # e.g. not the embedding of a token that does not occur
        if not len(live):
            print(f"finite difference  all zero  {name}")
            continue
        at = int(live[int(torch.randint(len(live), (1,), generator=generator))])
        losses = []
        for sign in (1, -1):
            moved = weights[name].clone()
            moved.view(-1)[at] += sign * 1e-5
            with torch.no_grad():
                losses.append(float(next_token_loss(forward(input_ids, {**weights, name: moved}, config), input_ids)))
        numeric, exact = (losses[0] - losses[1]) / 2e-5, float(gradient[at])
        print(f"finite difference  {numeric:+.9e}  autograd {exact:+.9e}  relative {abs(numeric - exact) / abs(exact):.1e}  {name}[{at}]")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the specification with the golden files.")
    parser.add_argument("golden", type=Path, help="folder with golden_config.json, golden_model and golden_io.safetensors")
    parser.add_argument("--float64", action="store_true", help="compute in fp64 instead of fp32")
    parser.add_argument("--grads", action="store_true", help="compare gradients with golden_grads.safetensors")
    parser.add_argument("--write-grads", type=Path, metavar="FILE", help="write the gradients (fp32)")
    parser.add_argument("--finite-differences", type=int, default=0, metavar="N", help="check N random parameters in fp64")
    parser.add_argument("--seed", type=int, default=0, help="for --finite-differences")
    args = parser.parse_args()
    from safetensors.torch import load_file, save_file

    config = json.loads((args.golden / "golden_config.json").read_text())
    weights = load_file(args.golden / "golden_model.safetensors")
    golden = load_file(args.golden / "golden_io.safetensors")
    ids = golden["input_ids"]
    used = {n: w.double() for n, w in weights.items()} if args.float64 else weights

    trace: list[Tensor] = []
    with torch.no_grad():
        logits = forward(ids, used, config, trace)
    rows = [(f"hidden.{i}", x) for i, x in enumerate(trace)] + [("logits", logits)]
    for name, ours in rows:
        difference = float((ours - golden[name]).abs().max())
        print(f"{name:9s}  max abs difference {difference:.2e}  of {float(golden[name].abs().max()):.3f}")
    print(f"loss       {float(next_token_loss(logits, ids)):.9f}  golden {float(golden['loss']):.9f}")

    if args.grads or args.write_grads:
        _, gradients, unused = loss_and_gradients(ids, used, config)
        if args.write_grads:
            save_file({n: g.float().contiguous() for n, g in gradients.items()}, args.write_grads)
        if args.grads:
            compare_gradients(gradients, load_file(args.golden / "golden_grads.safetensors"))
        print(f"no gradient ({len(unused)}): {', '.join(unused)}")
    if args.finite_differences:
        check_finite_differences(ids, weights, config, args.finite_differences, args.seed)


if __name__ == "__main__":
    main()
