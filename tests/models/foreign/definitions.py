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
COMMON = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_heads": 4, "norm_eps": 1e-3}
COMMON |= {"intermediate_size": 12, "max_position_embeddings": 64, "conv_size": TAPS}
DEFAULTS = {
    "kda": COMMON | {"num_heads": 2, "head_dim": 6, "expand_v": 1.5},
    "gla": COMMON | {"expand_k": 1.0, "expand_v": 1.5},
    "retnet": COMMON | {"expand_k": 1.5, "expand_v": 2.0},
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
            kinds = {"kda": kda_shapes, "gla": linear_shapes, "retnet": linear_shapes}
            shapes_of = kinds.get(config["model_type"], delta_shapes)
            soft = i in config.get("attn", {"layers": []})["layers"]
            of_layer = attention_shapes(config) if soft else shapes_of(config)
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


def kda_shapes(config):
    groups, heads, K, V = widths(config)
    out = {"q": groups * K, "k": groups * K, "v": heads * V}
    shapes = {f"{name}_proj.weight": (rows, HIDDEN) for name, rows in out.items()}
    if config.get("use_short_conv", True):
        shapes |= {f"{name}_conv1d.weight": (rows, 1, TAPS) for name, rows in out.items()}
    shapes |= {"f_proj.0.weight": (V, HIDDEN), "f_proj.1.weight": (heads * K, V), "g_proj.0.weight": (V, HIDDEN)}
    shapes |= {"g_proj.1.weight": (heads * V, V), "g_proj.1.bias": (heads * V,), "b_proj.weight": (heads, HIDDEN)}
    shapes |= {"A_log": (heads,), "dt_bias": (heads * K,)}
    return shapes | {"o_norm.weight": (V,), "o_proj.weight": (HIDDEN, heads * V)}


def linear_shapes(config):
    """Of gated linear attention and of retention."""
    heads, _, K, V = widths(config)
    kv = config.get("num_kv_heads") or heads
    out = {"q": heads * K, "k": kv * K, "v": kv * V}
    shapes = {f"{name}_proj.weight": (rows, HIDDEN) for name, rows in out.items()}
    gate = config.get("use_output_gate", True)
    shapes |= {"g_proj.weight": (heads * V, HIDDEN)} if gate else {}
    shapes[f"g_norm{'_swish_gate' if gate and config.get('fuse_norm', True) else ''}.weight"] = (V,)
    if config["model_type"] == "gla":
        if config.get("use_short_conv"):
            shapes |= {f"{name}_conv1d.weight": (rows, 1, TAPS) for name, rows in out.items()}
        shapes |= {"gk_proj.0.weight": (16, HIDDEN), "gk_proj.1.weight": (kv * K, 16), "gk_proj.1.bias": (kv * K,)}
    return shapes | {"o_proj.weight": (HIDDEN, heads * V)}


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
        kinds = {"kda": kda, "gla": linear_attention, "retnet": linear_attention}
        mix = mamba2 if mamba else kinds.get(config["model_type"], delta_rule)
        mix = attention if i in config.get("attn", {"layers": []})["layers"] else mix
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


def kda(config, w, hidden):
    groups, heads, K, V = widths(config)
    q, k, v = (hidden @ w[f"{name}_proj.weight"].T for name in "qkv")
    if config.get("use_short_conv", True):
        q, k, v = (convolved(x, w[f"{name}_conv1d.weight"]) for x, name in zip((q, k, v), "qkv"))
    q, k, v = F.silu(q).view(-1, groups, K), F.silu(k).view(-1, groups, K), F.silu(v).view(-1, heads, V)
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    beta = torch.sigmoid(hidden @ w["b_proj.weight"].T) * (2 if config.get("allow_neg_eigval") else 1)
    f = (hidden @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]).view(-1, heads, K)
    rate, bound = w["A_log"].exp()[:, None], config.get("lower_bound")
    decay = torch.exp(-rate * F.softplus(f) if bound is None else bound * torch.sigmoid(rate * f))
    o = torch.zeros_like(v)
    for h in range(heads):
        state, group = torch.zeros(K, V, dtype=v.dtype), h * groups // heads
        for t in range(len(v)):
            state, key = decay[t, h][:, None] * state, k[t, group]
            state = state + beta[t, h] * torch.outer(key, v[t, h] - key @ state)
            o[t, h] = K**-0.5 * q[t, group] @ state
    gate = hidden @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    o = rms(o, w["o_norm.weight"], config["norm_eps"]) * torch.sigmoid(gate).view(-1, heads, V)
    return o.flatten(1) @ w["o_proj.weight"].T


def linear_attention(config, w, hidden):
    """Gated linear attention, or retention: heads of k, v and the decay serve several heads of q."""
    heads, _, K, V = widths(config)
    q, k, v = (hidden @ w[f"{name}_proj.weight"].T for name in "qkv")
    if "q_conv1d.weight" in w:
        q, k, v = (F.silu(convolved(x, w[f"{name}_conv1d.weight"])) for x, name in zip((q, k, v), "qkv"))
    if config.get("feature_map") == "relu":
        q, k = F.relu(q), F.relu(k)
    q, k, v = q.view(-1, heads, K), k.view(len(k), -1, K), v.view(len(v), -1, V)
    if "gk_proj.0.weight" in w:
        f = hidden @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
        g = (F.logsigmoid(f) / 16).clamp(min=config.get("clamp_min") or -math.inf).view(len(f), -1, K)
    else:
        q, k = turned(q, 10_000.0), turned(k, 10_000.0)
        g = torch.log(1 - 2.0 ** (-5 - torch.arange(heads, dtype=q.dtype)))[None, :, None].expand(len(q), heads, K)
    k, v, g = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v, g))
    o = torch.zeros_like(v)
    for h in range(heads):
        state = torch.zeros(K, V, dtype=v.dtype)
        for t in range(len(v)):
            state = torch.exp(g[t, h])[:, None] * state + torch.outer(k[t, h], v[t, h])
            o[t, h] = K**-0.5 * q[t, h] @ state
    norm = "g_norm.weight" if "g_norm.weight" in w else "g_norm_swish_gate.weight"
    o = rms(o, w[norm], config["norm_eps"]).flatten(1)
    if "g_proj.weight" in w:
        o = o * F.silu(hidden @ w["g_proj.weight"].T)
    return o @ w["o_proj.weight"].T


def turned(x, base):
    """``[T, heads, width]``, pairs of channels turned by their positions."""
    width = x.shape[-1]
    angle = torch.arange(len(x))[:, None] * base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(config, w, hidden):
    heads, kv_heads = config["attn"]["num_heads"], config["attn"]["num_kv_heads"]
    width, base = HIDDEN // heads, config["attn"].get("rope_theta", 10_000.0)
    q, k, v = ((hidden @ w[f"{name}_proj.weight"].T).unflatten(-1, (-1, width)) for name in "qkv")
    q, k = turned(q, base), turned(k, base)
    o = torch.zeros_like(q)
    for h in range(heads):
        of = h * kv_heads // heads
        scores = (q[:, h] @ k[:, of].T / math.sqrt(width)).masked_fill(
            ~torch.ones(len(q), len(q)).tril().bool(), -math.inf
        )
        o[:, h] = scores.softmax(-1) @ v[:, of]
    return o.flatten(1) @ w["o_proj.weight"].T
