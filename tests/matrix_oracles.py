"""Layers of matrix states in NumPy float64 (or jax.numpy), one step of one sequence, written from their papers."""

import numpy as np


def _sigmoid(a, xp):
    return 1 / (1 + xp.exp(-a))


def _silu(a, xp):
    return a * _sigmoid(a, xp)


def _softplus(a, xp):
    return xp.logaddexp(a, 0)


def _mamba2(layer, p, state, u, xp):
    last, memory = state
    num_heads, per_group = layer.heads.num_heads, layer.heads.per_group
    z, xbc, delta = xp.split(u @ p["in_proj"], (layer.hidden_size, layer.hidden_size + layer.conv_size))
    window = xp.concatenate([last, xbc[None]])
    xbc = _silu((window * p["conv_kernel"]).sum(0) + p["conv_bias"], xp)
    x, b, c = xp.split(xbc, (layer.hidden_size, layer.hidden_size + layer.num_groups * layer.state_size))
    x = x.reshape(num_heads, layer.head_size)
    step = _softplus(delta + p["dt_bias"], xp)
    matrices, ys = [], []
    for head in range(num_heads):
        key, query = (each.reshape(layer.num_groups, -1)[head // per_group] for each in (b, c))
        decay = xp.exp(-xp.exp(p["A_log"][head]) * step[head])
        matrices.append(decay * memory[head] + step[head] * xp.outer(key, x[head]))
        ys.append(matrices[-1].T @ query + p["D"][head] * x[head])
    y = (xp.concatenate(ys) * _silu(z, xp)).reshape(layer.num_groups, -1)
    y = (y / xp.sqrt((y**2).mean(1, keepdims=True) + 1e-5)).reshape(-1) * p["norm"]
    return (window[1:], xp.stack(matrices)), y @ p["out_proj"]


def _gated_delta_net(layer, p, state, x, xp):
    last, memory = state
    groups, per_group, key_size, value_size = layer.heads
    qkv = xp.concatenate([x @ p[f"{name}_proj"] for name in "qkv"])
    window = xp.concatenate([last, qkv[None]])
    kernel = xp.concatenate([p[f"{name}_conv"] for name in "qkv"], 1)
    q, k, v = xp.split(_silu((window * kernel).sum(0), xp), (groups * key_size, 2 * groups * key_size))
    q, k, v = q.reshape(groups, -1), k.reshape(groups, -1), v.reshape(-1, value_size)
    q, k = (each / xp.sqrt((each**2).sum(1, keepdims=True) + 1e-6) for each in (q, k))
    beta = _sigmoid(x @ p["b_proj"], xp)
    decay = xp.exp(-xp.exp(p["A_log"]) * _softplus(x @ p["a_proj"] + p["dt_bias"], xp))
    matrices, ys = [], []
    for head in range(len(v)):
        key, query = k[head // per_group], q[head // per_group] / np.sqrt(key_size)
        kept = decay[head] * (xp.eye(key_size) - beta[head] * xp.outer(key, key)) @ memory[head]
        matrices.append(kept + beta[head] * xp.outer(key, v[head]))
        y = matrices[-1].T @ query
        ys.append(y / xp.sqrt((y**2).mean() + 1e-5) * p["o_norm"])
    gated = xp.concatenate(ys) * _silu(x @ p["g_proj"], xp)
    return (window[1:], xp.stack(matrices)), gated @ p["o_proj"]


def _mlstm(layer, p, state, x, xp):
    last, (memories, normalisers, ms) = state
    heads, _, size, _ = layer.heads
    u, z = xp.split(x @ p["proj_up"], 2)
    window = xp.concatenate([last, u[None]])
    c = _silu((window * p["conv_kernel"]).sum(0) + p["conv_bias"], xp)

    def blocks(weight, features):
        parts = features.reshape(-1, layer.block_size)
        return xp.concatenate([part @ weight[:, :, i] for i, part in enumerate(parts)])

    q, k, v = blocks(p["q_proj"], c), blocks(p["k_proj"], c), blocks(p["v_proj"], u)
    seen = xp.concatenate([q, k, v])
    log_i = seen @ p["igate"] + p["igate_bias"]
    log_f = -_softplus(-(seen @ p["fgate"] + p["fgate_bias"]), xp)
    q, k, v = q.reshape(heads, size), k.reshape(heads, size) / np.sqrt(size), v.reshape(heads, size)
    after, ys = [], []
    for head in range(heads):
        m = xp.maximum(xp.maximum(log_f[head] + ms[head], log_i[head]), 0)
        f, i = xp.exp(log_f[head] + ms[head] - m), xp.exp(log_i[head] - m)
        memory = f * memories[head] + i * xp.outer(k[head], v[head])
        normaliser = f * normalisers[head] + i * k[head]
        h = memory.T @ q[head] / xp.maximum(xp.abs(normaliser @ q[head]), xp.exp(-m))
        ys.append((h - h.mean()) / xp.sqrt(((h - h.mean()) ** 2).mean() + 1e-5))
        after.append((memory, normaliser, m))
    skipped = xp.concatenate(ys) * (1 + p["outnorm"]) + p["learnable_skip"] * c
    matrices = tuple(xp.stack(each) for each in zip(*after, strict=True))
    return (window[1:], matrices), (skipped * _silu(z, xp)) @ p["proj_down"]


_STEPS = {"mamba2": _mamba2, "gated_delta_net": _gated_delta_net, "mlstm": _mlstm}


def matrix_step(kind, layer, params, state, x, xp=np):
    """Computes one step for one sequence: the new state and the output."""
    params = {name: xp.asarray(value, np.float64) for name, value in params.items()}
    return _STEPS[kind](layer, params, state, x, xp)
