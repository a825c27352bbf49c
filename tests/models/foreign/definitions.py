"""Models in the layouts of flash-linear-attention, token by token: their tensors, and the logits that these tensors define.

Nothing is imported from the library. Every function takes one sequence and works in the dtype of its weights.
"""

import math

import torch
import torch.nn.functional as F

HIDDEN, VOCAB, LAYERS, TAPS, LEVELS = 16, 23, 2, 4, 15
MAMBA = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "expand": 2, "head_dim": 8}
MAMBA |= {"state_size": 6, "n_groups": 1, "conv_kernel": TAPS, "norm_eps": 1e-3, "hidden_act": "silu"}
DELTA = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_heads": 2, "conv_size": TAPS}
DELTA |= {"norm_eps": 1e-3, "intermediate_size": 12, "max_position_embeddings": 64, "use_gate": True}
DEFAULTS = {
    "mamba2": MAMBA,
    "log_linear_mamba2": MAMBA,
    "gated_deltanet": DELTA | {"head_dim": 6, "expand_v": 1.5},
    "delta_net": DELTA | {"expand_k": 0.75, "expand_v": 1.0, "use_gate": False},
}


def sizes_of(config):
    """Shapes of all tensors by name."""
    mamba = "expand" in config
    base, outer = ("backbone", "norm_f") if mamba else ("model", "norm")
    shapes = {f"{base}.embeddings.weight": (VOCAB, HIDDEN), f"{base}.{outer}.weight": (HIDDEN,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"{base}.layers.{i}"
        log_linear = config["model_type"] == "log_linear_mamba2"
        if mamba:
            shapes[f"{layer}.{'mixer_norm' if log_linear else 'norm'}.weight"] = (HIDDEN,)
            shapes |= {f"{layer}.mixer.{name}": shape for name, shape in mamba2_shapes(config, log_linear).items()}
        else:
            shapes[f"{layer}.attn_norm.weight"] = (HIDDEN,)
            of_layer = (
                attention_shapes(config) if i in config.get("attn", {"layers": []})["layers"] else delta_shapes(config)
            )
            shapes |= {f"{layer}.attn.{name}": shape for name, shape in of_layer.items()}
        if log_linear or not mamba:
            width = 256 if mamba else config["intermediate_size"]
            shapes[f"{layer}.mlp_norm.weight"] = (HIDDEN,)
            shapes |= {f"{layer}.mlp.{name}_proj.weight": (width, HIDDEN) for name in ("gate", "up")}
            shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, width)
    return shapes


def mamba2_shapes(config, log_linear):
    inner, keys = 2 * HIDDEN, config["n_groups"] * config["state_size"]
    heads = inner // config["head_dim"]
    rows = 2 * inner + 2 * keys + heads * (1 + LEVELS * log_linear)
    shapes = {
        "in_proj.weight": (rows, HIDDEN),
        "out_proj.weight": (HIDDEN, inner),
        "A_log": (heads,),
        "dt_bias": (heads,),
    }
    shapes |= {"D": (inner if config.get("D_has_hdim") else heads,), "conv1d.weight": (inner + 2 * keys, 1, TAPS)}
    if config.get("use_bias"):
        shapes |= {"in_proj.bias": (rows,), "out_proj.bias": (HIDDEN,)}
    if config.get("use_conv_bias", True):
        shapes["conv1d.bias"] = (inner + 2 * keys,)
    if config.get("rmsnorm", True):
        shapes["norm.weight"] = (inner,)
    return shapes | ({"L": (heads, LEVELS)} if log_linear else {})


def widths(config):
    """Key heads, value heads, K, V."""
    heads = config["num_heads"]
    if "expand_k" in config:
        return heads, heads, int(HIDDEN * config["expand_k"]) // heads, int(HIDDEN * config["expand_v"]) // heads
    return heads, config.get("num_v_heads") or heads, config["head_dim"], int(config["head_dim"] * config["expand_v"])


def delta_shapes(config):
    groups, heads, K, V = widths(config)
    out = {"q": groups * K, "k": groups * K, "v": heads * V}
    shapes = {f"{name}_proj.weight": (rows, HIDDEN) for name, rows in out.items()}
    shapes |= {"o_proj.weight": (HIDDEN, heads * V), "o_norm.weight": (V,)}
    if config.get("use_short_conv", True):
        shapes |= {f"{name}_conv1d.weight": (rows, 1, TAPS) for name, rows in out.items()}
    if config["use_gate"]:
        shapes["g_proj.weight"] = (heads * V, HIDDEN)
    if config.get("use_beta", True):
        shapes["b_proj.weight"] = (heads, HIDDEN)
    if config["model_type"] == "gated_deltanet":
        shapes |= {"a_proj.weight": (heads, HIDDEN), "A_log": (heads,), "dt_bias": (heads,)}
    return shapes


def attention_shapes(config):
    width = HIDDEN // config["attn"]["num_heads"]
    kv = config["attn"]["num_kv_heads"] * width
    return {f"{name}_proj.weight": (rows, HIDDEN) for name, rows in zip("qkvo", (HIDDEN, kv, kv, HIDDEN))}


def weights_of(config, seed=0):
    """Random tensors of these shapes in float64, none of them near a start that hides it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in sizes_of(config).items()
    }
    return {name: 1 + x if "norm" in name else x for name, x in weights.items()}


def logits(config, weights, ids):
    """``[T, vocabulary]`` of ids ``[T]``."""
    mamba = "expand" in config
    base, outer = ("backbone", "norm_f") if mamba else ("model", "norm")
    eps, embeddings = config["norm_eps"], weights[f"{base}.embeddings.weight"]
    hidden = embeddings[ids]
    for i in range(LAYERS):
        prefix = f"{base}.layers.{i}."
        own = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        kind = "mixer" if mamba else "attn"
        mixer = {name.removeprefix(f"{kind}."): x for name, x in own.items() if name.startswith(f"{kind}.")}
        norm = next(own[name] for name in ("mixer_norm.weight", "norm.weight", "attn_norm.weight") if name in own)
        mix = mamba2 if mamba else attention if i in config.get("attn", {"layers": []})["layers"] else delta_rule
        hidden = hidden + mix(config, mixer, rms(hidden, norm, eps))
        if "mlp_norm.weight" in own:
            x = rms(hidden, own["mlp_norm.weight"], eps)
            x = F.silu(x @ own["mlp.gate_proj.weight"].T) * (x @ own["mlp.up_proj.weight"].T)
            hidden = hidden + x @ own["mlp.down_proj.weight"].T
    return rms(hidden, weights[f"{base}.{outer}.weight"], eps) @ weights.get("lm_head.weight", embeddings).T


def rms(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def convolved(x, weight, bias=None):
    padded = F.pad(x, (0, 0, TAPS - 1, 0))
    y = sum(padded[i : i + len(x)] * weight[:, 0, i] for i in range(TAPS))
    return y if bias is None else y + bias


def level(t, s):
    return (t ^ s).bit_length()


def mamba2(config, w, hidden):
    groups, K, V = config["n_groups"], config["state_size"], config["head_dim"]
    inner, heads = 2 * HIDDEN, 2 * HIDDEN // V
    channels = inner + 2 * groups * K
    z, x, dt, dl = F.linear(hidden, w["in_proj.weight"], w.get("in_proj.bias")).tensor_split(
        [inner, inner + channels, inner + channels + heads], dim=-1
    )
    x, B, C = F.silu(convolved(x, w["conv1d.weight"], w.get("conv1d.bias"))).split([inner, groups * K, groups * K], -1)
    x, B, C = x.view(-1, heads, V), B.view(-1, groups, K), C.view(-1, groups, K)
    dt = F.softplus(dt + w["dt_bias"]).clamp(*config.get("dt_limit", (0, math.inf)))
    scales = F.softplus(w["L"] * dl.view(-1, heads, LEVELS)) if "L" in w else torch.ones(len(x), heads, LEVELS)
    D = w["D"].view(heads, -1)  # one number for a head, or one for each of its channels
    y = D * x
    for t in range(len(x)):
        decay = torch.ones(heads, dtype=x.dtype)
        for s in range(t, -1, -1):
            for h in range(heads):
                group = h * groups // heads
                y[t, h] += scales[t, h, level(t, s)] * decay[h] * (C[t, group] @ B[s, group]) * dt[s, h] * x[s, h]
            decay = decay * torch.exp(-w["A_log"].exp() * dt[s])
    y, gate = y.flatten(1), F.silu(z)
    if "norm.weight" in w:
        after = config.get("norm_before_gate", False)
        y = (y if after else y * gate).view(len(y), groups, -1)
        y = rms(y, w["norm.weight"].view(groups, -1), config["norm_eps"]).flatten(1)
        y = y * gate if after else y
    else:
        y = y * gate
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


def delta_rule(config, w, hidden):
    groups, heads, K, V = widths(config)
    activation = config.get("qk_activation", "silu")
    streams = []
    for name in "qkv":
        x = hidden @ w[f"{name}_proj.weight"].T
        if config.get("use_short_conv", True):
            x = convolved(x, w[f"{name}_conv1d.weight"])
        kind = "silu" if name == "v" else activation
        streams.append(
            {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}[kind](x)
        )
    q, k, v = streams[0].view(-1, groups, K), streams[1].view(-1, groups, K), streams[2].view(-1, heads, V)
    if config.get("qk_norm", "l2") == "l2":
        q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    else:
        q, k = (x / x.abs().sum(-1, keepdim=True) for x in (q, k))
    ones = torch.ones(len(v), heads, dtype=v.dtype)
    beta = torch.sigmoid(hidden @ w["b_proj.weight"].T) if config.get("use_beta", True) else ones
    beta = 2 * beta if config.get("allow_neg_eigval") else beta
    decay = ones
    if "A_log" in w:
        decay = torch.exp(-w["A_log"].exp() * F.softplus(hidden @ w["a_proj.weight"].T + w["dt_bias"]))
    o = torch.zeros_like(v)
    for h in range(heads):
        state, group = torch.zeros(K, V, dtype=v.dtype), h * groups // heads
        for t in range(len(v)):
            state = decay[t, h] * state
            key = k[t, group]
            state = state + beta[t, h] * torch.outer(key, v[t, h] - key @ state)
            o[t, h] = K**-0.5 * q[t, group] @ state
    o = rms(o, w["o_norm.weight"], config["norm_eps"])
    if config["use_gate"]:
        gate = (hidden @ w["g_proj.weight"].T).view(-1, heads, V)
        o = o * (torch.sigmoid(gate) if config.get("output_gate_activation") == "sigmoid" else F.silu(gate))
    return o.flatten(1) @ w["o_proj.weight"].T


def attention(config, w, hidden):
    heads, kv_heads = config["attn"]["num_heads"], config["attn"]["num_kv_heads"]
    width, base = HIDDEN // heads, config["attn"].get("rope_theta", 10_000.0)
    q, k, v = ((hidden @ w[f"{name}_proj.weight"].T).unflatten(-1, (-1, width)) for name in "qkv")
    angle = torch.arange(len(hidden))[:, None] * base ** (-torch.arange(0, width, 2, dtype=q.dtype) / width)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turned(x):
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    q, k = turned(q), turned(k)
    o = torch.zeros_like(q)
    for h in range(heads):
        of = h * kv_heads // heads
        scores = (q[:, h] @ k[:, of].T / math.sqrt(width)).masked_fill(
            ~torch.ones(len(q), len(q)).tril().bool(), -math.inf
        )
        o[:, h] = scores.softmax(-1) @ v[:, of]
    return o.flatten(1) @ w["o_proj.weight"].T
