"""The strongest Python peer we could write for Quasar pre-training on one GPU: plain PyTorch with
`torch._grouped_mm` experts, flash SDPA, the Triton chunk kernels of PyPI `fla-core`, fused AdamW and a chunked
cross-entropy. It is the yardstick that the Rust trainer is measured against, side by side in one run.

    python3 gpu_peer.py --layers 6 --runs 4,8,16r [--check golden_dir]

Prints one JSON line a run: tokens/s, step seconds, peak GiB, loss, model TFLOP/s.
Needs: torch >= 2.11 (CUDA), triton, fla-core == 0.6.0, einops, safetensors (for --check).
"""
import argparse, json, os, sys, time
import torch
import torch.nn.functional as F
from triton.runtime.autotuner import Autotuner
from torch.utils.checkpoint import checkpoint


def limit_autotuning(configs_each):
    """fla-core's full autotuning takes over 10 minutes on a fresh machine; keep the likeliest configurations of each kernel."""
    near = lambda g: (abs(g.num_warps - 4), abs(g.num_stages - 3), -sum(v for v in g.kwargs.values() if isinstance(v, int) and v <= 64))
    whole = Autotuner.__init__
    def limited(self, fn, arg_names, configs, *rest, **kw): whole(self, fn, arg_names, sorted(configs, key=near)[:configs_each] if configs else configs, *rest, **kw)
    Autotuner.__init__ = limited


limit_autotuning(int(os.environ.get("PEER_CONFIGS", 1)))
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.gsa import chunk_gsa
from fla.ops.simple_gla import chunk_simple_gla

PREVIEW = dict(vocab_size=157184, hidden_size=2048, intermediate_size=5120, num_hidden_layers=20,
    num_attention_heads=16, num_key_value_heads=4, head_dim=128, num_experts=256, num_experts_per_tok=8,
    n_group=8, topk_group=4, moe_intermediate_size=512, first_k_dense_replace=1, routed_scaling_factor=2.5,
    hybrid_attention_layers=list(range(4, 20)), hybrid_layerwise_cycle=["quasar", "raven", "quasar", "quasar", "gla"],
    hybrid_raven_slots=64, hybrid_raven_topk=32, partial_rotary_factor=0.5, rope_theta=10000, use_nope=True,
    nope_after_position=512, rms_norm_eps=1e-6, pad_token_id=156892)


def shrink(layers):
    """Preview's exact layer shapes with fewer layers: layer 0 dense, every later layer MoE + one branch of the cycle."""
    c = dict(PREVIEW, num_hidden_layers=layers)
    if layers < 20:
        c["hybrid_attention_layers"] = list(range(1, layers))
    return c


def branch_of(c, l):
    h = c["hybrid_attention_layers"]
    return c["hybrid_layerwise_cycle"][h.index(l) % len(c["hybrid_layerwise_cycle"])] if l in h else None


def init(c, device, dtype, seed=0):
    g = torch.Generator(device=device).manual_seed(seed)
    D, H, KV, d, E, I = (c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "moe_intermediate_size"))
    W = {}
    def mat(n, *s): W[n] = torch.empty(*s, device=device, dtype=dtype).normal_(0, 0.02, generator=g)
    def one(n, *s, v=1.0): W[n] = torch.full(s, v, device=device, dtype=dtype)
    mat("model.word_embeddings.weight", c["vocab_size"], D); mat("lm_head.weight", c["vocab_size"], D); one("model.norm.weight", D)
    for l in range(c["num_hidden_layers"]):
        p = f"model.layers.{l}."; a = p + "attention."; m = p + "mlp."
        one(p + "input_layernorm.weight", D); one(p + "post_attention_layernorm.weight", D)
        mat(a + "query_key_value.weight", (H + 2 * KV) * d, D); mat(a + "dense.weight", D, H * d)
        one(a + "query_layernorm.weight", d); one(a + "key_layernorm.weight", d)
        b = branch_of(c, l)
        if b:
            one(a + "replace_alpha_raw", 1, v=0.8473); one(a + "branch_output_gain", 1); one(a + "branch_global_output_gain", 1)
            one(a + "branch_output_channel_gain", D); mat(a + "branch_output_adapter_down.weight", 16, D); one(a + "branch_output_adapter_up.weight", D, 16, v=0.0)
        if b == "quasar":
            q = a + "quasar_attention."
            for n in "qkvo": mat(q + n + "_proj.weight", D, D)
            mat(q + "b_proj.weight", H, D); mat(q + "g_proj.0.weight", d, D); mat(q + "g_proj.1.weight", D, d); one(q + "g_proj.1.bias", D, v=0.0)
            W[q + "A_log"] = torch.empty(H, device=device).uniform_(1, 16, generator=g).log().to(dtype); one(q + "dt_bias", D, v=0.0); one(q + "o_norm.weight", d)
        elif b == "raven":
            q = a + "raven_attention."
            for n, s in (("q", D), ("o", D), ("k", KV * d), ("v", KV * d)): mat(q + n + "_proj.weight", s, D)
            mat(q + "r_proj.weight", H * c["hybrid_raven_slots"], D); mat(q + "a_proj.weight", H, D)
            W[q + "A_log"] = torch.empty(H, device=device).uniform_(1, 16, generator=g).log().to(dtype); one(q + "dt_bias", H, v=-4.0)
            one(q + "q_norm.weight", d); one(q + "k_norm.weight", d); one(q + "g_norm.weight", D)
        elif b == "gla":
            q = a + "gla_attention."
            mat(q + "query_key_value.weight", (H + 2 * KV) * d, D); mat(q + "dense.weight", D, D); mat(q + "g_proj.weight", D, D)
            one(q + "query_layernorm.weight", d); one(q + "key_layernorm.weight", d); one(q + "g_norm.weight", D)
        if l < c["first_k_dense_replace"]:
            mat(m + "gate_proj.weight", c["intermediate_size"], D); mat(m + "up_proj.weight", c["intermediate_size"], D); mat(m + "down_proj.weight", D, c["intermediate_size"])
        else:
            mat(m + "experts_w12", E, D, 2 * I); mat(m + "experts_w3", E, I, D); mat(m + "gate.weight", E, D)
            for n in ("gate", "up"): mat(m + f"shared_experts.{n}_proj.weight", I, D)
            mat(m + "shared_experts.down_proj.weight", D, I)
    B = {}
    for l in range(c["num_hidden_layers"]):
        if l >= c["first_k_dense_replace"]: B[f"model.layers.{l}.mlp.gate.expert_bias"] = torch.zeros(E, device=device)
        if branch_of(c, l) == "gla":
            n = max(c["num_hidden_layers"] - 1, 1)
            B[f"model.layers.{l}.attention.gla_attention.slope"] = torch.tensor([-2 ** (-(h + 1) / 2) * (1 - (l - 1) / n + 1e-5) for h in range(H)], device=device, dtype=torch.float32)
    return W, B


def rms(x, w, eps): return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * w


def rope_tables(T, c, device, dtype):
    pos = torch.arange(T, device=device); r = int(c["head_dim"] * c["partial_rotary_factor"])
    f = pos.float()[:, None] * (1.0 / c["rope_theta"] ** (torch.arange(0, r, 2, device=device).float() / r))[None]
    e = torch.cat([f, f], -1); cos, sin = e.cos(), e.sin()
    if c["use_nope"]:
        m = (pos >= c["nope_after_position"])[:, None]; cos = torch.where(m, torch.ones_like(cos), cos); sin = torch.where(m, torch.zeros_like(sin), sin)
    return cos.to(dtype)[None, :, None], sin.to(dtype)[None, :, None]


def rope(x, cos, sin):
    r = cos.shape[-1]; a, b = x[..., :r], x[..., r:]; h = r // 2
    return torch.cat([a * cos + torch.cat([-a[..., h:], a[..., :h]], -1) * sin, b], -1)


def qkv(x, W, p, c, cos, sin):
    B, T, _ = x.shape; H, KV, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q, k, v = F.linear(x, W[p + "query_key_value.weight"]).view(B, T, H + 2 * KV, d).split([H, KV, KV], 2)
    return rope(rms(q, W[p + "query_layernorm.weight"], c["rms_norm_eps"]), cos, sin), rope(rms(k, W[p + "key_layernorm.weight"], c["rms_norm_eps"]), cos, sin), v


def gqa(x, W, p, c, cos, sin):
    B, T, _ = x.shape; q, k, v = (t.transpose(1, 2) for t in qkv(x, W, p, c, cos, sin))
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(B, T, -1), W[p + "dense.weight"])


def gla(x, W, Bf, p, c, cos, sin):
    B, T, D = x.shape; H, KV, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q, k, v = qkv(x, W, p, c, cos, sin); k, v = k.repeat_interleave(H // KV, 2), v.repeat_interleave(H // KV, 2)
    o, _ = chunk_simple_gla(q, k, v.contiguous(), g_gamma=Bf[p + "slope"].float(), scale=d ** -0.5)
    o = F.rms_norm(o.float(), (d,), eps=c["rms_norm_eps"]).to(x.dtype).reshape(B, T, D) * W[p + "g_norm.weight"]
    return F.linear(o * torch.sigmoid(F.linear(x, W[p + "g_proj.weight"])), W[p + "dense.weight"])


def raven(x, W, p, c):
    B, T, D = x.shape; H, KV, M, K = c["num_attention_heads"], c["num_key_value_heads"], c["hybrid_raven_slots"], c["hybrid_raven_topk"]; d = D // H
    lin = lambda n, h: F.linear(x, W[p + n + "_proj.weight"]).view(B, T, h, -1)
    q, k, v = rms(F.silu(lin("q", H)), W[p + "q_norm.weight"], c["rms_norm_eps"]), rms(F.silu(lin("k", KV)), W[p + "k_norm.weight"], c["rms_norm_eps"]), F.silu(lin("v", KV))
    f = -W[p + "A_log"].float().exp() * F.softplus(F.linear(x, W[p + "a_proj.weight"]).float() + W[p + "dt_bias"].float())
    s = torch.sigmoid(lin("r", H)); idx = s.topk(K, -1).indices; w = s.gather(-1, idx); w = torch.zeros_like(s).scatter(-1, idx, w / (w.sum(-1, keepdim=True) + 1e-9))
    lf = (f[..., None] * w).to(q.dtype); s = (1 - lf.exp()).to(q.dtype)
    k, v = k.repeat_interleave(H // KV, 2), v.repeat_interleave(H // KV, 2)
    o, _ = chunk_gsa(q, k, v, s, lf, scale=1.0)
    return F.linear(rms(F.silu(o.reshape(B, T, D)), W[p + "g_norm.weight"], 1e-5), W[p + "o_proj.weight"])


def quasar(x, W, p, c):
    B, T, D = x.shape; H, d = c["num_attention_heads"], c["head_dim"]
    h = F.rms_norm(x.float().clamp(-60, 60), (D,), eps=1e-6).to(x.dtype)
    q, k, v = (F.silu(F.linear(h, W[p + n + "_proj.weight"])).view(B, T, H, d) for n in "qkv"); q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    b = torch.sigmoid(F.linear(h, W[p + "b_proj.weight"])).float(); k2 = k.float().pow(2).sum(-1).clamp(0.1, 10.0)
    a = (1 - torch.exp(-W[p + "A_log"].float().exp().view(1, 1, H, 1) * F.softplus(b[..., None] + W[p + "dt_bias"].float().view(1, 1, H, d)))) / (k2[..., None] + 1e-6)
    o, _ = chunk_delta_rule(q, k, v, a.mean(-1).clamp(1e-4, 0.95).to(q.dtype), scale=d ** -0.5)
    gate = F.linear(F.linear(h, W[p + "g_proj.0.weight"]), W[p + "g_proj.1.weight"], W[p + "g_proj.1.bias"]).view(B, T, H, d)
    y = F.rms_norm(o.float().clamp(-1e4, 1e4), (d,), eps=c["rms_norm_eps"]).to(x.dtype) * W[p + "o_norm.weight"].clamp(0, 4)
    return F.linear((y * torch.sigmoid(gate.float().clamp(-30, 30)).to(x.dtype)).reshape(B, T, -1), W[p + "o_proj.weight"])


def attention(x, W, Bf, p, c, l, cos, sin):
    o = gqa(x, W, p, c, cos, sin); b = branch_of(c, l)
    if b is None: return o
    y = quasar(x, W, p + "quasar_attention.", c) if b == "quasar" else raven(x, W, p + "raven_attention.", c) if b == "raven" else gla(x, W, Bf, p + "gla_attention.", c, cos, sin)
    og = W[p + "branch_output_gain"]; y = og * ((W[p + "branch_global_output_gain"] / og.clamp(min=1e-6)) * y) * W[p + "branch_output_channel_gain"]
    y = y + F.linear(F.linear(y, W[p + "branch_output_adapter_down.weight"]), W[p + "branch_output_adapter_up.weight"])
    return o + torch.sigmoid(W[p + "replace_alpha_raw"]) * y


def swiglu(x, W, p): return F.linear(F.silu(F.linear(x, W[p + "gate_proj.weight"])) * F.linear(x, W[p + "up_proj.weight"]), W[p + "down_proj.weight"])


def moe(x, W, Bf, p, c):
    B, T, D = x.shape; f = x.reshape(-1, D); N, E, G, K = f.shape[0], c["num_experts"], c["n_group"], c["num_experts_per_tok"]
    s = torch.sigmoid(F.linear(f.float(), W[p + "gate.weight"].float())); sr = s.detach() + Bf[p + "gate.expert_bias"]
    gi = sr.view(N, G, -1).topk(2, -1)[0].sum(-1).topk(c["topk_group"], -1)[1]
    keep = torch.zeros(N, G, device=x.device, dtype=torch.bool).scatter_(1, gi, True)[:, :, None].expand(N, G, E // G).reshape(N, E)
    idx = sr.masked_fill(~keep, float("-inf")).topk(K, -1)[1]; w = s.gather(1, idx)
    w = (w / (w.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]).to(x.dtype)
    order = idx.view(-1).argsort(stable=True); tok = order // K
    offs = torch.zeros(E, device=x.device, dtype=torch.int64).scatter_add_(0, idx.view(-1), torch.ones(N * K, device=x.device, dtype=torch.int64)).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(f[tok], W[p + "experts_w12"], offs=offs); a, b = h.chunk(2, -1)
    y = torch._grouped_mm(F.silu(a) * b, W[p + "experts_w3"], offs=offs) * w.view(-1)[order][:, None]
    return torch.zeros_like(f).index_add(0, tok, y).view(B, T, D) + swiglu(x, W, p + "shared_experts.")


def layer(x, W, Bf, c, l, cos, sin):
    p = f"model.layers.{l}."
    x = x + attention(rms(x, W[p + "input_layernorm.weight"], c["rms_norm_eps"]), W, Bf, p + "attention.", c, l, cos, sin)
    h = rms(x, W[p + "post_attention_layernorm.weight"], c["rms_norm_eps"])
    return x + (swiglu(h, W, p + "mlp.") if l < c["first_k_dense_replace"] else moe(h, W, Bf, p + "mlp.", c))


def loss_chunk(h, head, t): return F.cross_entropy(F.linear(h, head).float(), t, reduction="sum")


def loss_fn(ids, W, Bf, c, recompute=False, layer_fn=layer, chunk=2048):
    x = F.embedding(ids, W["model.word_embeddings.weight"], padding_idx=c["pad_token_id"]); cos, sin = rope_tables(ids.shape[1], c, ids.device, x.dtype)
    for l in range(c["num_hidden_layers"]):
        x = checkpoint(layer_fn, x, W, Bf, c, l, cos, sin, use_reentrant=False) if recompute else layer_fn(x, W, Bf, c, l, cos, sin)
    h = rms(x, W["model.norm.weight"], c["rms_norm_eps"])[:, :-1].reshape(-1, c["hidden_size"]); t = ids[:, 1:].reshape(-1)
    return sum(checkpoint(loss_chunk, h[i:i + chunk], W["lm_head.weight"], t[i:i + chunk], use_reentrant=False) for i in range(0, len(t), chunk)) / len(t)


def active_params(c):
    D, V, I, K = c["hidden_size"], c["vocab_size"], c["moe_intermediate_size"], c["num_experts_per_tok"]; H, KV, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]; n = V * D
    for l in range(c["num_hidden_layers"]):
        n += (H + 2 * KV) * d * D + D * D + {None: 0, "quasar": 4 * D * D + H * D + 2 * d * D, "raven": 2 * D * D + 2 * KV * d * D + H * c["hybrid_raven_slots"] * D, "gla": (H + 2 * KV) * d * D + 2 * D * D}[branch_of(c, l)]
        n += 3 * D * c["intermediate_size"] if l < c["first_k_dense_replace"] else 3 * D * I * (K + 1) + c["num_experts"] * D
    return n


def run(a, batch, recompute, compiled, fn):
    """One configuration: fresh weights, `warmup + steps` optimizer steps, median step time."""
    dev = "cuda"; torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    c = shrink(a.layers); W, Bf = init(c, dev, torch.bfloat16); W = {k: v.requires_grad_() for k, v in W.items()}
    opt = torch.optim.AdamW(list(W.values()), lr=1e-5, weight_decay=0.0, fused=True); g = torch.Generator(device=dev).manual_seed(1); ts = []
    for i in range(a.warmup + a.steps):
        ids = torch.randint(0, c["vocab_size"] - 1000, (batch, a.seq), device=dev, generator=g); torch.cuda.synchronize(); t = time.perf_counter()
        loss = loss_fn(ids, W, Bf, c, recompute, fn); loss.backward(); torch.nn.utils.clip_grad_norm_(list(W.values()), 1.0, foreach=True); opt.step(); opt.zero_grad(set_to_none=True)
        torch.cuda.synchronize(); ts.append(time.perf_counter() - t)
        if i < a.warmup: print(f"warm-up step {i}: {ts[-1]:.2f} s", file=sys.stderr, flush=True)
    s = sorted(ts[a.warmup:])[a.steps // 2]; tok = batch * a.seq
    print(json.dumps(dict(peer="torch+fla", compile=compiled, recompute=recompute, layers=a.layers, batch=batch, seq=a.seq, params=sum(v.numel() for v in W.values()), active=active_params(c), step_s=round(s, 4), tokens_per_s=round(tok / s), model_tflops=round(6 * active_params(c) * tok / s / 1e12, 1), peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1), loss=round(loss.item(), 3))), flush=True)


def main():
    p = argparse.ArgumentParser(); p.add_argument("--layers", type=int, default=6); p.add_argument("--seq", type=int, default=2048); p.add_argument("--steps", type=int, default=10); p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--runs", default="4,8,16r", help="batch sizes; suffix r recomputes activations, c compiles the layer"); p.add_argument("--check", help="folder with the golden_* files"); a = p.parse_args(); torch.manual_seed(0)
    if a.check:
        from safetensors.torch import load_file
        c = json.load(open(a.check + "/golden_config.json")); sd = {k: v.cuda() for k, v in load_file(a.check + "/golden_model.safetensors").items()}; io = load_file(a.check + "/golden_io.safetensors"); c.setdefault("pad_token_id", 0)
        print("golden loss", io["loss"].item(), "here (bf16)", loss_fn(io["input_ids"].cuda(), {k: v.to(torch.bfloat16) for k, v in sd.items()}, sd, c).item()); return
    for spec in a.runs.split(","):
        try: run(a, int(spec.rstrip("rc")), "r" in spec, "c" in spec, torch.compile(layer, dynamic=False) if "c" in spec else layer)
        except torch.OutOfMemoryError: print(json.dumps(dict(peer="torch+fla", run=spec, error="out of memory")), flush=True)


if __name__ == "__main__":
    main()
