"""No path and no gradient holds a table of all rows against all keys, however the tiles are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import mask as masks
from jaxattn.core import slots, statistics
from jaxattn.core.attend import attend, attend_call, make_call, merge
from jaxattn.core.linear import linear_attend
from jaxattn.core.select import from_mask
from jaxattn.core.types import Meta, View
from tests.jaxprs import intermediates, largest

N, D = 2048, 8
X = jax.ShapeDtypeStruct((1, N, 1, D), jnp.float32)
ROWS = jax.ShapeDtypeStruct((1, N), jnp.float32)
LABEL = np.arange(N, dtype=np.int32)[None] // 100


def dense(q, k, v):
    part = attend(q, k, v)
    return part.out, part.lse


def causal(q, k, v):
    return attend(q, k, v, mask=masks.causal()).out


def windowed(q, k, v):
    return attend(q, k, v, mask=masks.causal() & (masks.window(256) | masks.first(4)), sink_logit=q[0, 0, :, 0]).out


def traced_labels(q, k, v):
    """Metas that are only known at run time: the block map is made of bounds, not of elements."""
    meta = Meta.of(N, seg=jnp.asarray(LABEL) + (k[0, 0, 0, 0] > 0))
    return attend(q, k, v, mask=masks.same("seg") & masks.causal(), q_meta=meta, k_meta=meta).out


def selected(q, k, v):
    active = jnp.einsum("bqhd,bkhd->bhqk", q[:, ::64], k[:, ::32]) > 0
    return attend(q, k, v, where=from_mask(active, unit=32, tile=64, cap=16), mask=masks.causal()).out


def merged(q, k, v):
    halves = [attend(q, k[:, i::2], v[:, i::2]) for i in range(2)]
    return merge(*halves).out


def cached(q, k, v):
    view = View(k, v, Meta.of(N, pos=np.arange(N)[None] - N))
    return attend_call(make_call(q, k, v, past=(view,), mask=masks.causal()))[0].out


def received(q, k, v):
    view = View(v, v, Meta.of(N, pos=np.arange(N)[None] - N))
    call = make_call(q, k, v, past=(view,), mask=masks.causal())
    lse = attend_call(call)[0].lse
    return statistics.received(call, lse, q[..., 0, 0], temperature=1.0), statistics.log_mass(call, 0.5)


def row_sums(q, k, v):
    call = make_call(q, k, v, k_meta=Meta.of(N, seg=LABEL % 4), mask=masks.causal())
    lse = attend_call(call)[0].lse
    return statistics.entropy(call, lse), statistics.distance(call, lse), statistics.masses(call, "seg", 4, lse)


def iterated(q, k, v):
    return statistics.iterated(make_call(q, k, v), v[:, :, 0, 0], 3, 0.1)


def profile(q, k, v):
    return statistics.profile(q, k, 64)


def linear(q, k, v):
    return jax.tree.leaves(linear_attend(q, k, v))


FAST = [dense, causal, windowed, traced_labels, selected, merged, cached, received, row_sums, iterated, profile, linear]


def scalar(f):
    return lambda *args: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(*args)))


@pytest.mark.parametrize("f", FAST, ids=lambda f: f.__name__)
def test_no_path_and_no_gradient_has_a_map(f):
    for run in (f, jax.grad(scalar(f), (0, 1, 2))):
        size, primitive, shape = largest(run, X, X, X)
        assert size < N * N, f"{primitive} makes {shape}"


def test_merging_tokens_has_no_map():
    x, slot = jax.ShapeDtypeStruct((1, N, 4), jnp.float32), jnp.arange(N)[None] // 2

    def merge_all(x, w):
        return slots.merge_tokens(x, slot, N // 2, weight=w)

    for run in (merge_all, jax.grad(scalar(merge_all), (0, 1))):
        assert largest(run, x, ROWS)[0] < N * N


def test_the_check_sees_maps_wherever_they_hide():
    plain = lambda q, k, v: attend(q, k, v, mask=masks.causal(), implementation="reference").out  # noqa: E731
    inside = {
        "jit": jax.jit(plain),
        "scan": lambda q, k, v: jax.lax.scan(lambda c, _: (plain(c, k, v), None), q, None, length=2)[0],
        "while": lambda q, k, v: jax.lax.fori_loop(0, q.shape[0] + 1, lambda i, c: plain(c, k, v), q),
        "cond": lambda q, k, v: jax.lax.cond(q[0, 0, 0, 0] > 0, plain, lambda q, k, v: q, q, k, v),
        "remat": jax.grad(scalar(jax.checkpoint(plain))),
        "grad": jax.grad(scalar(plain)),
    }
    for name, f in inside.items():
        assert largest(f, X, X, X)[0] >= N * N, name

    @jax.custom_vjp
    def hidden(x):
        return x

    hidden.defvjp(lambda x: (x, x), lambda x, g: (g + jnp.outer(x, x).sum(0),))
    assert largest(hidden, ROWS)[0] < N * N
    assert largest(jax.grad(lambda x: hidden(x[0]).sum()), ROWS)[0] >= N * N
    assert any(name == "dot_general" for name, _ in intermediates(jax.make_jaxpr(plain)(X, X, X)))
