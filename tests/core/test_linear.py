import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core.linear import (
    linear_attend,
    linear_reference,
    linear_step,
    row_correct,
    scan_mix,
    taylor2,
    with_ones,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "112-lightning-attention" / "io.npz"
B, N, H, G, F, D = 2, 37, 4, 2, 5, 3
DECAYS = ("none", "head", "token", "channel")
attend = jax.jit(linear_attend, static_argnames=("chunk", "causal", "scale", "implementation"))
reference = jax.jit(functools.partial(linear_attend, implementation="reference"), static_argnames=("scale",))


def inputs(decay="none", n=N, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=s) for s in ((B, n, H, F), (B, n, G, F), (B, n, G, D)))
    shape = {"none": None, "head": (H,), "token": (B, n, H), "channel": (B, n, H, F)}[decay]
    d = None if shape is None else (-rng.exponential(0.5, size=shape)).astype(dtype)
    return *(x.astype(dtype) for x in (q, k, v)), d, rng.normal(size=(B, H, F, D)).astype(dtype)


def quadratic(q, k, v, d, state):
    """Independent float64 formula: explicit weight of every pair."""
    q, k, v, state = (np.asarray(x, np.float64) for x in (q, k, v, state))
    k, v = np.repeat(k, H // k.shape[2], 2), np.repeat(v, H // v.shape[2], 2)
    n = q.shape[1]
    full = np.zeros((B, n, H, F))
    if d is not None:
        d = np.asarray(d, np.float64)
        full += d[..., None] if d.ndim == 3 else d if d.ndim == 4 else d[None, None, :, None]
    out = np.zeros((B, n, H, v.shape[-1]))
    for t in range(n):
        for s in range(t + 1):
            weight = np.exp(full[:, s + 1 : t + 1].sum(1))
            out[:, t] += (q[:, t] * k[:, s] * weight).sum(-1)[..., None] * v[:, s]
        out[:, t] += np.einsum("bhf,bhfe->bhe", q[:, t] * np.exp(full[:, : t + 1].sum(1)), state)
    return out


@pytest.mark.parametrize("decay", DECAYS)
def test_quadratic_is_chunk_is_step(decay):
    q, k, v, d, s0 = inputs(decay)
    want = quadratic(q, k, v, d, s0)
    step, state = reference(q, k, v, log_decay=d, state=s0)
    np.testing.assert_allclose(step, want, atol=2e-5)
    for chunk in (1, 7, 64):
        out, last = attend(q, k, v, log_decay=d, state=s0, chunk=chunk)
        np.testing.assert_allclose(out, want, atol=2e-5)
        np.testing.assert_allclose(last, state, atol=2e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_state_hands_off_at_any_split(decay):
    q, k, v, d, _ = inputs(decay, n=20)
    out, state = attend(q, k, v, log_decay=d, chunk=8)

    def piece(a, b):
        return q[:, a:b], k[:, a:b], v[:, a:b], d if d is None or d.ndim == 1 else d[:, a:b]

    for split in (1, 8, 13) if decay == "token" else (13,):  # every split compiles two programs
        *qkv, d1 = piece(0, split)
        first, s = attend(*qkv, log_decay=d1, chunk=8)
        *qkv, d2 = piece(split, 20)
        second, s = attend(*qkv, log_decay=d2, state=s, chunk=8)
        np.testing.assert_allclose(np.concatenate([first, second], 1), out, atol=2e-5)
        np.testing.assert_allclose(s, state, atol=2e-5)
    *qkv, d1 = piece(0, 19)
    _, s = attend(*qkv, log_decay=d1, chunk=8)
    last, s = linear_step(s, q[:, 19], k[:, 19], v[:, 19], d if d is None or d.ndim == 1 else d[:, 19])
    np.testing.assert_allclose(last, out[:, 19], atol=2e-5)
    np.testing.assert_allclose(s, state, atol=2e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients(decay):
    with jax.enable_x64(True):
        q, k, v, d, s0 = inputs(decay, n=21, dtype=np.float64)
        rng = np.random.default_rng(1)
        wo, ws = rng.normal(size=(B, 21, H, D)), rng.normal(size=(B, H, F, D))

        def loss(fn, q, k, v, d, s0):  # reads the output and the final state
            out, state = fn(q, k, v, log_decay=d, state=s0)
            return jnp.sum(out * wo) + jnp.sum(state * ws)

        argnums = (0, 1, 2, 4) if d is None else (0, 1, 2, 3, 4)
        fast = functools.partial(linear_attend, chunk=8)
        got = jax.jit(jax.grad(functools.partial(loss, fast), argnums))(q, k, v, d, s0)
        want = jax.jit(jax.grad(functools.partial(loss, linear_reference), argnums))(q, k, v, d, s0)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", ("head", "token", "channel"))
def test_strong_decays_and_resets_stay_finite(decay):
    q, k, v, d, s0 = inputs(decay, n=40)
    hard = np.full_like(d, -20.0)
    if decay != "head":
        hard[:, 5] = -np.inf
        hard[:, 6:9] = -0.01

    def loss(q, k, v, d, s0):
        out, state = linear_attend(q, k, v, log_decay=d, state=s0, chunk=32)
        return jnp.sum(out**2) + jnp.sum(state**2), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(q, k, v, hard, s0)
    assert all(np.isfinite(g).all() for g in grads)
    want, _ = reference(q, k, v, log_decay=hard, state=s0)
    np.testing.assert_allclose(out, want, atol=3e-4)
    if decay != "head":  # nothing from before the reset is seen after it
        moved = attend(q, k, np.where(np.arange(40)[:, None, None] < 5, v + 9, v), log_decay=hard)[0]
        np.testing.assert_allclose(moved[:, 5:], attend(q, k, v, log_decay=hard)[0][:, 5:], atol=1e-5)


def test_golden_without_and_with_decay():
    g = np.load(GOLDEN)
    q, k, v = (g[n].transpose(0, 2, 1, 3) for n in ("q", "k", "v"))
    out, _ = attend(q, k, v, chunk=4)
    np.testing.assert_allclose(out, g["core_nodecay"].transpose(0, 2, 1, 3), atol=1e-5)
    out, state = attend(q, k, v, log_decay=-g["slope"].reshape(-1), chunk=4)
    np.testing.assert_allclose(out, g["core"].transpose(0, 2, 1, 3), atol=1e-5)
    np.testing.assert_allclose(state, g["kv"], atol=1e-5)


def test_not_causal_sees_everything():
    q, k, v, _, s0 = inputs()
    out, state = attend(q, k, v, causal=False, state=s0, scale=0.5)
    kk, vv = np.repeat(k, H // G, 2), np.repeat(v, H // G, 2)
    want = np.einsum("bthf,bshf,bshe->bthe", q, kk, vv) + np.einsum("bthf,bhfe->bthe", q, s0)
    np.testing.assert_allclose(out, 0.5 * want, atol=1e-4)
    _, causal_state = attend(q, k, v, state=s0)
    np.testing.assert_allclose(state, causal_state, atol=1e-4)
    wide = np.repeat(v, H // G, 2)  # keys of G heads, values of H heads
    np.testing.assert_allclose(attend(q, k, wide, causal=False, state=s0, scale=0.5)[0], out, atol=1e-5)


def test_bfloat16_accumulates_in_float32():
    q, k, v, _, _ = inputs(n=30)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    d = np.full(H, -0.01, np.float32)
    out, state = attend(*low, log_decay=d, chunk=8)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    exact, want = attend(*(x.astype(jnp.float32) for x in low), log_decay=d, chunk=8)
    np.testing.assert_allclose(state, want, atol=1e-5)
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=1e-2, atol=1e-6)


def _largest(jaxpr):
    size = max((v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")), default=0)
    return max([size, *(_largest(j) for e in jaxpr.eqns for j in _inner(e.params))])


def _inner(params):
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns"):
                yield x
            elif hasattr(x, "jaxpr"):
                yield x.jaxpr


@pytest.mark.parametrize("decay", DECAYS)
def test_no_quadratic_array(decay):
    n = 512
    q, k, v, d, s0 = inputs(decay, n=n)
    q, k, v, s0 = q[:1, :, :1], k[:1, :, :1], v[:1, :, :1], s0[:1, :1]
    d = None if d is None else d[:1] if d.ndim == 1 else d[:1, :, :1]

    def loss(fn, *args):
        return jnp.sum(fn(*args[:3], log_decay=args[3], state=args[4])[0] ** 2)

    fast = functools.partial(loss, functools.partial(linear_attend, chunk=32))
    for f in (fast, jax.grad(fast, (0, 1, 2, 4))):
        assert _largest(jax.make_jaxpr(f)(q, k, v, d, s0).jaxpr) < n * n / 16
    # the counter does see an N x N array when there is one
    full = jax.make_jaxpr(lambda a, b: jax.jit(jnp.dot)(a, b.T))(q[0, :, 0], k[0, :, 0])
    assert _largest(full.jaxpr) == n * n


def test_row_correct():
    rng = np.random.default_rng(0)
    q, k = (rng.uniform(0.1, 1, size=(B, 9, H, F)).astype(np.float32) for _ in range(2))
    v = rng.normal(size=(B, 9, H, D)).astype(np.float32)
    n, weight = 9, np.einsum("bthf,bshf->bhts", q, k) / 9
    both, _ = attend(q, k, with_ones(v), causal=False, scale=1 / n)
    num, z, vbar = both[..., :-1], both[..., -1], v.mean(1, keepdims=True)

    def check(w, mode):
        np.testing.assert_allclose(w.sum(-1), 1.0, atol=1e-4)
        want = np.einsum("bhts,bshe->bthe", w, v)
        np.testing.assert_allclose(row_correct(num, z, vbar, mode), want, atol=1e-4)

    total = weight.sum(-1, keepdims=True)
    check(weight / total, "divide")
    check(weight - total / n + 1 / n, "inline")
    check(weight * (1 + 1 / total) - total / n, "mala")
    assert row_correct(num, z, None, "none") is num
    empty, grad = jax.value_and_grad(lambda x: row_correct(x, jnp.sum(x, -1)).sum())(jnp.zeros((1, 2, 1, 3)))
    assert empty == 0 and np.isfinite(grad).all()


def test_taylor2_is_the_polynomial():
    q, k, _, _, _ = inputs()
    s = np.einsum("bthf,bshf->bhts", q, np.repeat(k, H // G, 2)) / np.sqrt(F)
    for packed, width in ((False, 1 + F + F * F), (True, 1 + F + F * (F + 1) // 2)):
        a, b = taylor2(q, packed), np.repeat(taylor2(k, packed), H // G, 2)
        assert a.shape[-1] == width
        np.testing.assert_allclose(np.einsum("bthf,bshf->bhts", a, b), 1 + s + s * s / 2, atol=1e-4)


def test_scan_mix():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.2, 1, size=(2, 13, 1)), rng.normal(size=(2, 13, 4))
    x0 = rng.normal(size=(2, 4))
    for reverse in (False, True):
        x, want = x0, np.zeros_like(b)
        for t in range(13)[:: -1 if reverse else 1]:
            x = want[:, t] = a[:, t] * x + b[:, t]
        got = scan_mix(jnp.asarray(a), jnp.asarray(b), 1, initial=jnp.asarray(x0), reverse=reverse)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    q, k, v, d, s0 = inputs("token")
    for name, call in {
        "implementation": lambda: linear_attend(q, k, v, implementation="cuda"),
        "k": lambda: linear_attend(q, k[..., :2], v),
        "v": lambda: linear_attend(q, k, v[:, :3]),
        "log_decay": lambda: linear_attend(q, k, v, log_decay=d[:, :, :1]),
        "state": lambda: linear_attend(q, k, v, state=s0[:1]),
        "chunk": lambda: linear_attend(q, k, v, chunk=0),
        "mode": lambda: row_correct(v, v[..., 0], None, "softmax"),
        "vbar": lambda: row_correct(v, v[..., 0], None, "mala"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
    with pytest.raises(ValueError, match="^log_decay:"):
        linear_attend(q, k, v, log_decay=d, causal=False)
