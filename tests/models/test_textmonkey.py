"""TextMonkey: windows alone and together, what the queries read, and the model around them."""

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

from models import llm, vit
from models.bind import Bound
from models.multimodal import textmonkey as tm
from models.multimodal import vlm
from tests.models.small import quick

generation = importlib.import_module("models.generate")
RNG = np.random.default_rng(0)
TOWER = vit.config(12, 3, 3, 16, 2, channels=2, hidden=32, cls=False, post_norm=False)
LANGUAGE = llm.tiny(vocab=24, layers=2, dim=16, hidden=16)
CONFIG = tm.TextMonkeyConfig(TOWER, LANGUAGE, windows=(2, 1), cross=((1, 8, 2), (2, 16, 4)), window=4, shift=2, queries=2,
                             pool_heads=2, overview=True)  # fmt: skip
B = 2
IMAGE = RNG.uniform(size=(B, 24, 12, 2)).astype(np.float32)
TEXT = RNG.integers(1, 24, (B, 4)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return tm.init(CONFIG)


def look(program, arrays, params, image, text):
    """(logits, visual rows, their Meta, patches behind the tower)."""
    out, visual = vlm.forward(Bound(program, arrays, params), image, text, phase="prefill")
    return out.logits, visual.x, visual.meta, visual.tower.streams.x


run = quick(look, static_argnums=0)


def talking(params, seed=5):
    """Parameters whose windows say something to each other."""
    keys = jax.random.split(jax.random.key(seed), len(params["cross"]))
    cross = {name: {**p, "last": {"kernel": 0.5 * jax.random.normal(k, p["last"]["kernel"].shape)}}
             for k, (name, p) in zip(keys, params["cross"].items(), strict=True)}  # fmt: skip
    return {**params, "cross": cross}


def attention_by_hand(p, x, heads, window, shift):
    """One map [h, w, C], token by token: who is in my window of the shifted, filled map, and was near me before?"""
    h, w, c = x.shape
    size = [min(n, window) for n in (h, w)]
    moved = [shift if n > s else 0 for n, s in zip((h, w), size, strict=True)]
    H, W = (-(-n // s) * s for n, s in zip((h, w), size, strict=True))
    filled = np.zeros((H, W, c))
    filled[:h, :w] = np.roll(x, (-moved[0], -moved[1]), (0, 1))
    part = lambda i, n, s, m: 0 if not m else 0 if i < n - s else 1 if i < n - m else 2  # noqa: E731
    q, k, v = np.split(filled @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
    split = lambda y: y.reshape(H, W, heads, -1)  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    out = np.zeros((H, W, c))
    for i in range(H):
        for j in range(W):
            same = [(a, b) for a in range(H) for b in range(W)
                    if (a // size[0], b // size[1]) == (i // size[0], j // size[1])
                    and part(a, H, size[0], moved[0]) == part(i, H, size[0], moved[0])
                    and part(b, W, size[1], moved[1]) == part(j, W, size[1], moved[1])]  # fmt: skip
            for head in range(heads):
                near = [(i - a + size[0] - 1) * (2 * size[1] - 1) + j - b + size[1] - 1 for a, b in same]
                logit = [q[i, j, head] @ k[a, b, head] * (c // heads) ** -0.5 + p["bias"][at, head]
                         for at, (a, b) in zip(near, same, strict=True)]  # fmt: skip
                weight = np.exp(logit - np.max(logit))
                weight /= weight.sum()
                d = c // heads
                out[i, j, head * d : (head + 1) * d] = sum(m * v[a, b, head] for m, (a, b) in zip(weight, same, strict=True))
    out = out @ p["proj"]["kernel"] + p["proj"]["bias"]
    return np.roll(out[:h, :w], moved, (0, 1))


@pytest.mark.parametrize("grid", [(8, 3), (7, 6)])
def test_shifted_windows_by_hand(grid):
    """A map of whole windows as high as two and narrower than one; one that is filled up."""
    record = tm.CrossWindows(grid, (1, 1), 8, 2, window=4, shift=2)
    p = record.init_params(jax.random.key(0), 8)
    p = {name: p[name] for name in ("qkv", "proj", "bias")} | {"bias": 3 * RNG.normal(size=p["bias"].shape).astype(np.float32)}
    x = RNG.normal(size=(2, *grid, 8)).astype(np.float32)
    found = quick(functools.partial(tm.shifted_attention, heads=2, window=4, shift=2))(p, x)
    for b in range(2):
        np.testing.assert_allclose(found[b], attention_by_hand(jax.tree.map(np.asarray, p), x[b], 2, 4, 2), atol=1e-4)


def test_at_the_start_windows_are_encoded_alone(params):
    bound = tm.bind(CONFIG, params, keep=None)
    _, x, meta, rows = run(*bound, IMAGE, TEXT)
    assert x.shape == (B, 3 * 4, 16) and CONFIG.visual == 12
    np.testing.assert_array_equal(meta.pos, np.tile(np.arange(12), (B, 1)))
    alone = quick(lambda im: vit.forward(vit.bind(TOWER, params["vision"]), im).streams.x)
    crops = np.stack([IMAGE[:, :12], IMAGE[:, 12:]], 1).reshape(2 * B, 12, 12, 2)
    np.testing.assert_allclose(rows, alone(crops), atol=1e-5)
    # The upper window's queries, read by hand: another lower window changes nothing.
    other = IMAGE.copy()
    other[:, 12:] = 1 - other[:, 12:]
    again = run(*bound, other, TEXT)
    np.testing.assert_allclose(again[1][:, :4], x[:, :4], atol=1e-5)
    assert np.abs(again[1][:, 4:] - x[:, 4:]).max() > 1e-3

    told = run(*tm.bind(CONFIG, talking(params), keep=None), IMAGE, TEXT)
    unlike = run(*tm.bind(CONFIG, talking(params), keep=None), other, TEXT)
    assert np.abs(unlike[1][:, :4] - told[1][:, :4]).max() > 1e-3, "windows that talk hear each other"
    assert np.abs(told[3] - rows).max() > 1e-2
    np.testing.assert_allclose(told[1][:, 8:], x[:, 8:], atol=1e-5)  # the overview is one window


def test_queries_read_patches_by_hand(params):
    c = dataclasses.replace(CONFIG, vision=dataclasses.replace(TOWER, image=(6, 6)))  # as many patches as queries
    p, x = params["resampler"], RNG.normal(size=(1, 4, 16)).astype(np.float32)
    q = jax.tree.map(np.asarray, p)

    def norm(p, y):
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    dense = lambda p, y: y @ p["kernel"] + p.get("bias", 0)  # noqa: E731
    freq = 10000.0 ** -(np.arange(4) / 4)
    half = lambda i: np.concatenate([np.sin(i * freq), np.cos(i * freq)])  # noqa: E731
    at = np.stack([np.concatenate([half(col), half(row)]) for row in range(2) for col in range(2)])
    kv = norm(q["kv_norm"], dense(q["kv"], x[0]))
    heads = lambda y: y.reshape(4, 2, 8).transpose(1, 0, 2)  # noqa: E731
    s = heads(dense(q["q"], norm(q["query_norm"], q["query"]) + at)) @ heads(dense(q["k"], kv + at)).transpose(0, 2, 1)
    s = np.exp(s / np.sqrt(8))
    out = (s / s.sum(-1, keepdims=True) @ heads(dense(q["v"], kv))).transpose(1, 0, 2).reshape(4, 16)
    want = dense(q["proj"], norm(q["post_norm"], dense(q["o"], out)))
    np.testing.assert_allclose(quick(tm.resample, static_argnums=1)(p, c, x)[0], want, atol=1e-4)


def test_the_token_resampler_and_the_language_model(params):
    logits, x, meta, _ = run(*tm.bind(CONFIG, params, keep=5), IMAGE, TEXT)
    _, whole, _, _ = run(*tm.bind(CONFIG, params, keep=None), IMAGE, TEXT)
    live = np.asarray(meta.valid)
    assert (live.sum(-1) == 5 + 4).all() and np.isfinite(logits).all()
    for b in range(B):  # a new resampler changes no token; the overview stands behind them all
        pos = np.asarray(meta.pos)[b][live[b]]
        assert (np.diff(pos) > 0).all() and pos[-4:].tolist() == [8, 9, 10, 11]
        np.testing.assert_allclose(np.asarray(x)[b][live[b]], np.asarray(whole)[b][pos], atol=1e-5)
    model = tm.bind(CONFIG, params, keep=5, cache="full")
    ask = quick(lambda arrays: generation.prefill(model._replace(arrays=arrays), TEXT, image=IMAGE, max_new=1)[0])
    np.testing.assert_allclose(ask(model.arrays), logits[:, -1], atol=1e-5)


def test_zero_layers_learn_and_what_is_refused(params):
    bound = tm.bind(CONFIG, params, keep=5)

    def loss(cross):
        return look(bound.program, bound.arrays, {**params, "cross": cross}, IMAGE, TEXT)[0].sum()

    found = quick(jax.grad(loss))(params["cross"])
    for gradient in found.values():
        assert np.abs(gradient["last"]["kernel"]).max() > 0 and np.abs(gradient["qkv"]["kernel"]).max() == 0
    with pytest.raises(ValueError, match=r"image: expected \[batch, 24, 12, 2\]"):
        vlm.see(bound, IMAGE[:, :12])
    with pytest.raises(ValueError, match="reduce: expected inside the tower"):
        tm.bind(CONFIG, params, reduce={"vision.1": "uniform:keep=4"})
    with pytest.raises(ValueError, match="cross: expected"):
        dataclasses.replace(CONFIG, cross=((3, 8, 2),))
