"""Reductions of a softmax map that is never built: one streaming pass over tile pairs, from the rows' log mass.

``reduce(operands, options, lse, weights)`` takes the operands and options of ``pallas_kernels.flash`` (``v`` is not
read), the rows' log mass float [B, N, H] and row weights float [B, N, H]; with p_ij = exp(s_ij - lse_i) over the keys
that row i sees it returns

  columns [B, H, M]: sum_i weights_i p_ij         logits [B, N, H]: sum_j p_ij s_ij

Rows whose lse is -inf contribute 0. Gradients flow to every float operand, lse and weights, from both outputs.

``profile(operands, options, weights)`` needs no lse: one call of two passes, rows' log mass and then columns.

``diagonals(q, k, scale=...)`` is the causal profile of the last rows: q [B, R, H, D] are the queries of the last R of
the M keys k [B, M, G, D]. It returns per key the sum of p over the R rows (vertical [B, H, M]) and the sums of p along
diagonals (slash [B, H, M]; index M - 1 is the main diagonal, M - 1 - s the one s keys further back).

Implementations: "reference" (the full table), "xla", "tpu" and "gpu" (Pallas kernels, backward too, that take what
flash's do but tables of biases and weights of units; the derivative of ``diagonals`` is that of "xla" on all).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import choose, kernels
from pallas_kernels._mesh import Dims
from pallas_kernels.flash import dims as flash_dims
from pallas_kernels.flash import lists
from pallas_kernels.flash.pairs import FAR
from pallas_kernels.profile import reference, xla


def _bodies(name: str) -> dict:
    return {"reference": getattr(reference, name), "xla": getattr(xla, name)} | kernels(__name__, name)


# Bodies that a call without a name may use; an accelerator's joins once it has been measured on a device.
MEASURED = frozenset({"xla"})
REDUCE, PROFILE, DIAGONALS = (_bodies(name) for name in ("reduce", "profile", "diagonals"))


def dims(operands: dict, options) -> Dims:
    """What the dimensions are called, for a mesh: sums over queries are not cut by length."""
    sides = {x: operands[x] for x in ("lse", "weights") if x in operands}
    names = flash_dims({x: a for x, a in operands.items() if x not in sides}, options).operands
    names |= {x: ("batch", None, "heads") for x in sides}
    whole = lambda x: tuple(None if name == "length" else name for name in x)  # noqa: E731
    columns, rows = ("batch", "heads", None), ("batch", None, "heads")
    return Dims(jax.tree.map(whole, names, is_leaf=lambda x: isinstance(x, tuple)), (columns, rows))


def _refusal(operands: dict, options, name: str) -> str | None:
    from pallas_kernels.flash import layout

    return layout.unsupported(operands | {"v": operands["k"][..., :0]}, options)


def _run(bodies: dict, operands: dict, options, implementation: str | None, mesh):
    operands = lists.clean({x: a for x, a in operands.items() if a is not None and x != "v"}, options)
    refusal, names = functools.partial(_refusal, operands, options), functools.partial(dims, operands, options)
    return choose(bodies, MEASURED, implementation, refusal, names, mesh)(operands, options)


def reduce(operands: dict, options, lse, weights, implementation: str | None = None, mesh=None):
    """(columns [B, H, M], logits [B, N, H]); see the module's docstring. ``mesh``: devices to cut a kernel's call over,
    None for those of ``jax.set_mesh``."""
    some = jnp.isfinite(lse)  # exp(s - -inf) must not be formed, in values or gradients
    known = {"lse": jnp.where(some, lse, FAR), "weights": jnp.where(some, weights, 0.0)}
    columns, logits = _run(REDUCE, operands | known, options, implementation, mesh)
    return columns, jnp.where(some, logits, 0.0)


def column_sums(operands: dict, options, lse, weights, implementation: str | None = None, mesh=None):
    """sum_i weights_i exp(s_ij - lse_i), [B, H, M]."""
    return reduce(operands, options, lse, weights, implementation, mesh)[0]


def mean_logits(operands: dict, options, lse, implementation: str | None = None, mesh=None):
    """sum_j exp(s_ij - lse_i) s_ij, [B, N, H]."""
    return reduce(operands, options, lse, jnp.zeros_like(lse), implementation, mesh)[1]


def profile(operands: dict, options, weights, implementation: str | None = None, mesh=None):
    """(columns [B, H, M], lse [B, N, H]) of the operands alone: sum_i weights_i softmax_j(s_ij), and the rows' log mass
    (-inf for rows that see nothing, which count nowhere)."""
    return _run(PROFILE, operands | {"weights": weights}, options, implementation, mesh)


def diagonals(q, k, lse=None, scale: float | None = None, implementation: str | None = None, mesh=None):
    """(vertical [B, H, M], slash [B, H, M]); see the module's docstring. ``lse``: the rows' log mass [B, R, H] where it is
    known, or where the softmax is over more than these keys. ``scale``: of the logits, default D ** -0.5."""
    operands = {"q": q, "k": k} | ({} if lse is None else {"lse": jnp.where(jnp.isfinite(lse), lse, FAR)})

    def refusal(name: str) -> str | None:
        for x, a in (("q", q), ("k", k)):
            if a.dtype not in (jnp.float32, jnp.bfloat16) or a.dtype != q.dtype:
                return f"{x} of {a.dtype}: expected float32 or bfloat16, the same for q and k"
        if q.shape[3] > 256:
            return f"a head size of {q.shape[3]}: expected at most 256"
        return f"{q.shape[1]} last rows: expected at most 512" if q.shape[1] > 512 else None

    def names() -> Dims:
        rows, sums = ("batch", None, "heads"), ("batch", "heads", None)
        return Dims({x: rows if x == "lse" else (*rows, None) for x in operands}, (sums, sums))

    body = choose(DIAGONALS, MEASURED, implementation, refusal, names, mesh)
    return body(operands, q.shape[-1] ** -0.5 if scale is None else scale)


__all__ = ["MEASURED", "column_sums", "diagonals", "mean_logits", "profile", "reduce"]
