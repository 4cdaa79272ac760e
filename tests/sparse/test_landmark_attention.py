"""Landmark attention: the released layer and its gradients, invariants, retrieval, stingy positions, the data side."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.attend import attend, make_call
from jaxattn.core.mask import causal
from jaxattn.core.rope import Rope
from jaxattn.core.types import Ctx, Meta, State, View
from jaxattn.sparse.landmark_attention import (
    insert_landmarks,
    jumping_positions,
    landmark_attention,
    landmark_loss_mask,
    landmark_reference,
)
from tests.jaxprs import largest

module = importlib.import_module("jaxattn.sparse.landmark_attention")  # the package exports the factory
REFERENCE = jax.jit(landmark_reference, static_argnums=3)


def apply(method, call, **ctx):
    return jax.jit(lambda c: method.apply({}, State(), c, Ctx(**ctx))[0].out)(call)


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(5)
    q = rng.normal(size=(2, 31, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 31, 2, 8)).astype(np.float32)
    return q, k, v


def wide(k):
    return np.repeat(k, 2, axis=2)


def test_golden_layer_and_gradients(golden):
    io = golden("019-landmark-attention")

    def layer(x, w_qkv, w_o):
        q, k, v = jnp.split((x @ w_qkv.T), 3, axis=-1)
        q, k, v = (a.reshape(2, 44, 2, 16) for a in (q, k, v))
        out = landmark_attention(10).apply({}, State(), make_call(q, k, v, mask=causal()), Ctx())[0].out
        y = out.reshape(2, 44, 32) @ w_o.T
        return (y * io["grad_y"]).sum(), (y, q, k, v)

    with jax.enable_x64(True):
        args = [jnp.asarray(io[n]) for n in ("x", "w_qkv", "w_o")]
        (_, (y, q, k, v)), grads = jax.jit(jax.value_and_grad(layer, (0, 1, 2), has_aux=True))(*args)
        one_hot = jnp.broadcast_to(jnp.eye(44)[:, None], (2, 44, 2, 44))
        probs = REFERENCE(q, k, one_hot, 10)  # values that tell the weights
        fast = np.asarray(apply(landmark_attention(10), make_call(q, k, one_hot)))
    np.testing.assert_array_equal(io["is_mem"][0], np.arange(44) % 11 == 10)
    np.testing.assert_allclose(y, io["y"], atol=1e-10)
    for name, got in zip(("x", "w_qkv", "w_o"), grads, strict=True):
        np.testing.assert_allclose(got, io["grad_" + name], atol=1e-10, err_msg=name)
    np.testing.assert_allclose(np.moveaxis(probs, 2, 1), io["probs"], atol=1e-10)
    np.testing.assert_allclose(fast, probs, atol=1e-12)
    np.testing.assert_allclose(fast.sum(-1), 1.0, atol=1e-12)
    assert not fast[..., 10::11].any()  # landmarks carry no value


def test_tiles_padding_order_and_grouped_heads(small, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    q, k, v = small
    want = REFERENCE(q, wide(k), wide(v), 4)
    np.testing.assert_allclose(apply(landmark_attention(4), make_call(q, k, v)), want, atol=1e-5)
    # Rows of padding before the first position, garbage in them; keys in any order.
    pad = [(0, 0), (3, 0), (0, 0), (0, 0)]
    order = np.random.default_rng(0).permutation(34)
    pos, valid = np.arange(-3, 31)[None], np.arange(34)[None] >= 3
    kp, vp = (np.pad(x, pad, constant_values=7.0)[:, order] for x in (k, v))
    call = make_call(
        np.pad(q, pad), kp, vp, mask=causal(), q_meta=Meta.of(34, pos=np.maximum(pos, 0)),
        k_meta=Meta.of(34, pos=np.maximum(pos, 0)[:, order], valid=valid[:, order]),
    )  # fmt: skip
    np.testing.assert_allclose(apply(landmark_attention(4), call)[:, 3:], want, atol=1e-5)


def test_one_block_is_dense_attention_without_the_landmark(small):
    q, k, v = (x[:, :9] for x in small)
    want = attend(q[:, :8], k[:, :8], v[:, :8], mask=causal()).out
    out = apply(landmark_attention(8), make_call(q, k, v))
    np.testing.assert_allclose(out[:, :8], want, atol=1e-5)
    last = attend(q[:, 8:], k[:, :8], v[:, :8]).out  # the landmark's own row reads its block
    np.testing.assert_allclose(out[:, 8:], last, atol=1e-5)


def test_rows_without_keys_are_zero_with_finite_gradients(small):
    q, k, v = (x[:, :12] for x in small)
    meta = Meta.of(12, valid=np.arange(12)[None] >= np.array([[5], [0]]))

    def loss(q, k, v):
        out = landmark_attention(3).apply({}, State(), make_call(q, k, v, k_meta=meta), Ctx())[0].out
        return (out**2).sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert not np.asarray(out)[0, :5].any() and np.asarray(out)[0, 5:].any((-1, -2)).all()
    assert all(np.isfinite(g).all() for g in grads) and not np.asarray(grads[1])[0, :5].any()


def split_call(q, k, v, at, *, rope=None, order=None):
    """Rows from ``at`` on, the earlier ones in a cache (rotated, perhaps permuted, with empty rows)."""
    pos = np.arange(q.shape[1], dtype=np.int32)[None]
    if rope is not None:
        q, k = rope.apply(q, pos), rope.apply(k, pos)
    order = np.arange(at) if order is None else order
    empty = [(0, 0), (0, 5), (0, 0), (0, 0)]
    meta = Meta.of(at + 5, pos=np.pad(pos[:, order], [(0, 0), (0, 5)]), valid=np.arange(at + 5)[None] < at)
    view = View(jnp.pad(k[:, order], empty, constant_values=9), jnp.pad(v[:, order], empty, constant_values=9), meta)
    new = Meta.of(q.shape[1] - at, pos=pos[:, at:])
    return make_call(q[:, at:], k[:, at:], v[:, at:], mask=causal(), past=(view,), q_meta=new, k_meta=new, rope=rope)


def test_reading_a_cache_is_the_one_shot_result(small):
    q, k, v = small
    want = REFERENCE(q, wide(k), wide(v), 4)[:, 22:]
    order = np.random.default_rng(2).permutation(22)
    call = split_call(q, k, v, 22, order=order)
    np.testing.assert_allclose(apply(landmark_attention(4), call), want, atol=1e-5)
    # As many blocks as there are (4 of 5 rows, 2 rows left over), at true positions.
    out = apply(landmark_attention(4, retrieve=4, positions="true"), call)
    np.testing.assert_allclose(out, want, atol=1e-5)
    # One token at a time.
    out = apply(landmark_attention(4, retrieve=6, positions="true"), split_call(q, k, v, 30))
    np.testing.assert_allclose(out, REFERENCE(q, wide(k), wide(v), 4)[:, 30:], atol=1e-5)


def stingy(q, k, v, at, every, best, rope, selection):
    """By the paper: [B, N - at, H, Dv], one query and head at a time, keys never rotated before their use."""
    size, scale = every + 1, q.shape[-1] ** -0.5
    done = at // size
    out = np.zeros((*q.shape[:1], q.shape[1] - at, *q.shape[2:]))

    def turned(x, pos):
        angle = pos[:, None] * rope.frequencies()
        a, c = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - c * np.sin(angle), c * np.cos(angle) + a * np.sin(angle)], -1)

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    start = min(done, best + 1) * size
    far = max(done - best - 1, 0)
    slots = np.maximum(np.arange(done) - far, 0)
    for b in range(q.shape[0]):
        qs = [turned(q[b, at:, h], start + np.arange(at, q.shape[1]) - done * size) for h in range(q.shape[2])]
        p = np.stack([[softmax(turned(k[b, every :: size, h][:done], slots * size + every) @ x * scale) for x in qs[h]]
                      for h in range(q.shape[2])])  # fmt: skip
        p = {"per_token_and_head": p, "max_over_heads": np.broadcast_to(p.max(0), p.shape),
             "max_over_tokens": np.broadcast_to(p.max(1, keepdims=True), p.shape)}[selection]  # fmt: skip
        for h, i in np.ndindex(q.shape[2], q.shape[1] - at):
            picks = np.sort(np.argsort(-p[h, i], kind="stable")[:best])
            keys, values, marks = [], [], []
            for j, c in enumerate(picks):
                pos = (j + (slots[c] > 0 if done > best else 0)) * size + np.arange(size)
                rows = np.arange(c * size, c * size + size)
                keys.append(turned(k[b, rows, h], pos))
                values.append(v[b, rows, h])
            rows = np.arange(done * size, at + i + 1)
            local = turned(k[b, rows, h], start + rows - done * size)
            blocks = [(a, x) for a, x in zip(keys, values, strict=True)]
            while len(local) > size or (len(local) == size and rows[-1] // size != (at + i) // size):
                blocks.append((local[:size], v[b, rows[:size], h]))
                local, rows = local[size:], rows[size:]
            local, rows = local[:every], rows[:every]
            marks = np.array([a[-1] @ qs[h][i] * scale for a, _ in blocks])
            weights = softmax(np.concatenate([marks, local @ qs[h][i] * scale]))
            inner = [softmax(a[:-1] @ qs[h][i] * scale) @ x[:-1] for a, x in blocks]
            out[b, i, h] = weights[len(blocks) :] @ v[b, rows, h] + weights[: len(blocks)] @ np.array(inner)
    return out


@pytest.mark.parametrize("selection, best", [("per_token_and_head", 2), ("max_over_heads", 4), ("max_over_tokens", 6)])
def test_retrieval_at_stingy_positions(small, selection, best):
    q, k, v = (x[:1, :, :2] for x in small)
    k, v = k[:, :, :2], v[:, :, :2]
    rope = Rope(8, base=100.0)
    method = landmark_attention(3, retrieve=best, selection=selection)
    call = split_call(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), 25, rope=rope, order=np.arange(25)[::-1])
    np.testing.assert_allclose(apply(method, call), stingy(q, k, v, 25, 3, best, rope, selection), atol=2e-5)
    assert method == landmark_attention(3, retrieve=best, selection=selection)


def test_data_side():
    tokens = np.arange(1, 12).reshape(1, 11)
    marked = insert_landmarks(tokens, 4, 0)
    np.testing.assert_array_equal(marked, [[1, 2, 3, 4, 0, 5, 6, 7, 8, 0, 9, 10, 11]])
    np.testing.assert_array_equal(insert_landmarks(jnp.asarray(tokens), 4, 0), marked)
    ask = landmark_loss_mask(13, 4)
    assert not ask[[3, 8]].any() and ask.sum() == 11 and landmark_loss_mask(13, 4, include_landmark=True).all()
    pos = np.asarray(jumping_positions(jax.random.key(0), 3, 13, 4, 5))
    step = np.diff(pos, axis=1)
    assert (np.delete(step, [4, 9], 1) == 1).all() and (step[:, [4, 9]] >= 1).all() and (step[:, [4, 9]] <= 5).all()
    assert step[:, [4, 9]].max() > 1 and (pos[:, 0] == 0).all()


def test_group_dropout_keeps_the_local_mass_and_the_mean(small):
    q, k, v = small
    one_hot = jnp.broadcast_to(jnp.eye(31)[:, None], (2, 31, 2, 31))
    call = make_call(q, k, one_hot)
    plain = np.asarray(apply(landmark_attention(4), call))
    method = landmark_attention(4, group_dropout=0.5)
    np.testing.assert_array_equal(apply(method, call), plain)  # not training
    run = jax.jit(lambda key: method.apply({}, State(), call, Ctx(phase="train", key=key))[0].out)
    draws = np.asarray(jax.lax.map(run, jax.random.split(jax.random.key(0), 64)))
    own = np.broadcast_to((np.arange(31)[:, None] // 5 == np.arange(31) // 5)[None, :, None], plain.shape)
    np.testing.assert_allclose(draws[:, own], np.broadcast_to(plain[own], draws[:, own].shape), atol=1e-6)
    some = ~own & (plain > 1e-3)
    assert set(np.unique(np.round(draws[:, some] / plain[some], 3))) == {0.0, 2.0}
    np.testing.assert_allclose(draws.mean(0), plain, atol=0.3)


def test_bfloat16_and_errors(small):
    q, k, v = small
    out = apply(landmark_attention(4), make_call(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))))
    assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()
    np.testing.assert_allclose(np.asarray(out, np.float32), REFERENCE(q, wide(k), wide(v), 4), atol=0.06)
    with pytest.raises(ValueError, match="selection"):
        landmark_attention(selection="best")
    with pytest.raises(ValueError, match="sink_logit"):
        apply(landmark_attention(4), make_call(q, k, v, sink_logit=jnp.zeros(4)))


def test_memory_is_linear_in_the_gradient():
    q = jnp.zeros((1, 2048, 1, 8))
    run = lambda q, k, v: landmark_attention(63).apply({}, State(), make_call(q, k, v), Ctx())[0].out.sum()  # noqa: E731
    elements, _, shape = largest(jax.grad(run, (0, 1, 2)), q, q, q)
    assert elements <= module.ROWS * (2048 + 64), shape
