"""Transformers written out in numpy with explicit maps, to check the models against. One layer at a time, float64."""

from __future__ import annotations

import math

import numpy as np

erf = np.vectorize(math.erf)


def tree(params):
    """Parameters as float64 numpy."""
    return {k: tree(v) for k, v in params.items()} if isinstance(params, dict) else np.asarray(params, np.float64)


def norm(p, x, eps):
    if "bias" in p:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"]
    return y + p["bias"] if "bias" in p else y


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def turn(x, pos, base):
    """Rotary embedding, channels i and i + D / 2 paired: x [B, N, H, D], pos [B, N]."""
    half = x.shape[-1] // 2
    angle = pos[..., None, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def layer(params, i: int):
    return {k: layer(v, i) for k, v in params.items()} if isinstance(params, dict) else params[i]


def block(p, c, x, pos, seen):
    """(x after the layer, attention map [B, H, N, N]); seen: bool [B, N, N]."""
    b, n, _ = x.shape
    h = norm(p["norm1"], x, c.eps)
    q, k, v = (dense(p["attn"][s], h).reshape(b, n, -1, c.head_dim) for s in "qkv")
    if c.qk_norm:
        q, k = norm(p["attn"]["q_norm"], q, c.eps), norm(p["attn"]["k_norm"], k, c.eps)
    if c.rope is not None:
        q, k = turn(q, pos, c.rope.base), turn(k, pos, c.rope.base)
    k, v = (np.repeat(y, c.heads // c.kv_heads, axis=2) for y in (k, v))
    s = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(c.head_dim)
    s = np.where(seen[:, None], s, -np.inf)
    a = np.exp(s - s.max(-1, keepdims=True))
    a = a / a.sum(-1, keepdims=True)
    out = dense(p["attn"]["o"], np.einsum("bhnm,bmhd->bnhd", a, v).reshape(b, n, -1))
    x = x + (out * p["scale1"]["scale"] if c.layer_scale else out)
    h, act = norm(p["norm2"], x, c.eps), ACTIVATIONS[c.activation]
    m = p["mlp"]
    y = dense(m["down"], act(dense(m["gate"], h)) * dense(m["up"], h) if c.gated else act(dense(m["up"], h)))
    return x + (y * p["scale2"]["scale"] if c.layer_scale else y), a


def run(params, c, layers: int, x, pos, seen, stop=None):
    """(x, maps [L, B, H, N, N], residual streams that entered each layer)."""
    maps, entered = [], []
    for i in range(layers if stop is None else stop):
        entered.append(x)
        x, a = block(layer(params["layers"], i), c, x, pos, seen)
        maps.append(a)
    return x, np.array(maps), entered


def llm(params, c, tokens, *, pos=None, seen=None):
    """Logits [B, N, V] of models.language.llm."""
    params, b, n = tree(params), *tokens.shape
    order = np.arange(n)
    pos = np.broadcast_to(order, (b, n)) if pos is None else pos
    if seen is None:
        seen = order[:, None] >= order
        if c.block.window is not None:
            seen = seen & (order[:, None] - order < c.block.window)
        seen = np.broadcast_to(seen, (b, n, n))
    x, _, _ = run(params, c.block, c.layers, params["embed"]["embedding"][tokens], pos, seen)
    x = norm(params["norm"], x, c.block.eps)
    return x @ params["embed"]["embedding"].T if c.tie else dense(params["head"], x)


def patches(image, patch: int, window: int):
    """[B, H, W, C] -> [B, patches, window * window * C] by loops over an image with zeros around it."""
    margin = (window - patch) // 2
    b, h, w, c = image.shape
    wide = np.zeros((b, h + 2 * margin, w + 2 * margin, c))
    wide[:, margin : margin + h, margin : margin + w] = image
    rows = [
        wide[:, y : y + window, x : x + window].reshape(b, -1) for y in range(0, h, patch) for x in range(0, w, patch)
    ]
    return np.stack(rows, 1)


def tower(params, c, image, stop=None):
    """(rows, maps, entered) of a vision tower, before its last norm."""
    params = tree(params)
    x = patches(image, c.patch, c.stem or c.patch)
    if c.stem_hidden:
        x = np.maximum(dense(params["stem"], x), 0)
    x = dense(params["patch"], x) + params["pos"]
    if c.special:
        x = np.concatenate([np.broadcast_to(params["special"], (len(x), *params["special"].shape)), x], 1)
    if c.pre_norm:
        x = norm(params["pre_norm"], x, c.block.eps)
    seen = np.ones((len(x), x.shape[1], x.shape[1]), bool)
    return run(params, c.block, c.layers, x, np.zeros(x.shape[:2]), seen, stop)
