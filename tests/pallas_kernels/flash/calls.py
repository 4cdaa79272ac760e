"""Calls of the flash operation for the tests of its bodies, and the comparison of a body with the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core import mask as masks
from jaxattn.core.attend import lower, make_call
from jaxattn.core.types import Meta, Selection
from pallas_kernels.flash import reference
from pallas_kernels.flash.xla import divide


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Soft cap, distance, and a product of a row and a key float."""

    def fields(self):
        return frozenset({"pos"})

    def __call__(self, logits, q, k, row, key):
        near = jnp.exp(-0.1 * jnp.abs(q["pos"] - k["pos"]).astype(logits.dtype))
        return 4.0 * jnp.tanh(logits / 4.0) + row["slope"] * near + row["slope"] * key["tone"]


def call(rng, *, n, m=None, b=1, h=1, g=1, d=8, dv=None, tile=None, unit=None, hs=1, k=None, dtype=jnp.float32, mask=None,
         score_mod=None, key_bias=None, padded=0, bounds=False, normalizer="softmax"):  # fmt: skip
    """(operands, options) with random lists, some of them empty, and labels "seg" and "kind"."""
    m, dv, tile, unit = m or n, dv or d, tile or n, unit or m or n
    tiles, units = -(-n // tile), -(-m // unit)
    k = min(k or units, units)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    index = np.stack([np.sort(rng.permutation(units)[:k]) for _ in range(b * hs * tiles)])
    count = rng.integers(0, k + 1, size=(b, hs, tiles)) if tiles > 1 else np.full((b, hs, tiles), k)
    where = Selection(jnp.asarray(index.reshape(b, hs, tiles, k), jnp.int32), jnp.asarray(count, jnp.int32), unit, tile)
    if bounds:
        edges = np.sort(rng.integers(0, unit + 1, size=(b, hs, tiles, k, 2)), -1)
        where = where.replace(bounds=jnp.asarray(edges, jnp.int32))

    def meta(rows, pos):
        valid = np.arange(rows)[None] < rows - padded * (1 + np.arange(b))[:, None]
        labels = {x: jnp.asarray(rng.integers(0, 3, size=(b, rows)), jnp.int32) for x in ("seg", "kind")}
        return Meta.of(rows, pos=jnp.asarray(pos, jnp.int32)[None], valid=jnp.asarray(valid), **labels)

    row = {"slope": array(b, n, h).astype(jnp.float32)} if score_mod else {}
    key = {"tone": array(1, m, 1).astype(jnp.float32)} if score_mod else {}
    if key_bias:
        key["bias"] = array(b, m, key_bias).astype(jnp.float32)
    made = make_call(array(b, n, h, d), array(b, m, g, d), array(b, m, g, dv), where=where, mask=mask, score_mod=score_mod,
                     q_meta=meta(n, np.arange(n) + m - n), k_meta=meta(m, np.arange(m)), row=row, key=key,
                     normalizer=normalizer)  # fmt: skip
    return lower(made)


def compare(body, o, opt, tol):
    """Assert that ``body(o, opt)`` has the reference's values and gradients, of both outputs, up to ``tol`` of each
    tensor's largest entry."""
    floats, ints = divide(o)

    def with_gradient(fn):
        def loss(floats):
            out, lse = fn(floats | ints, opt)
            seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
            weight = lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)  # noqa: E731
            return (out.astype(jnp.float32) * weight(out)).sum() + (seen * weight(seen)).sum(), (out, lse)

        (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
        return {"out": found[0], "lse": jnp.where(found[1] == -jnp.inf, -1e4, found[1])} | {"d": grads}

    want, got = with_gradient(reference.flash), with_gradient(body)
    for (path, x), y in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, path
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        np.testing.assert_allclose(y, x, rtol=0, atol=tol * max(np.abs(x).max(), 1e-3), err_msg=str(path))


RICH = masks.mutual() & masks.same("seg") | ~masks.key_is("kind", 2) & masks.first(3) | masks.window(5, 2)
CALLS = {
    "one row": dict(n=1, m=17, h=3, d=33, dv=5, unit=8),
    "17: lists and facts of kv heads, live ranges": dict(
        n=17, m=23, b=2, h=4, g=2, d=256, dv=64, tile=8, unit=8, hs=2, k=2, mask=masks.causal(), key_bias=2, bounds=True
    ),
    "127: a list per query head, score_mod": dict(
        n=127, b=2, h=2, d=80, tile=40, unit=24, hs=2, k=4, mask=masks.causal(), score_mod=Slopes(), key_bias=1
    ),
    "129: bfloat16, a shared list, padding, labels": dict(
        n=129, b=2, h=2, d=128, dv=20, tile=64, unit=33, k=3, mask=RICH, padded=4, dtype=jnp.bfloat16
    ),
    "1000": dict(n=1000, h=2, g=1, d=96, tile=256, unit=128, mask=masks.causal()),
}
