"""Reductions of a softmax map that is never built: one streaming pass over tile pairs, from the rows' log mass.

``reduce(operands, options, lse, weights)`` takes the operands and options of ``pallas_kernels.flash`` (``v`` is not
read), the rows' log mass float [B, N, H] and row weights float [B, N, H]; with p_ij = exp(s_ij - lse_i) over the keys
that row i sees it returns

  columns [B, H, M]: sum_i weights_i p_ij         logits [B, N, H]: sum_j p_ij s_ij

Rows whose lse is -inf contribute 0. Gradients flow to every float operand, lse and weights, from both outputs.

``diagonals(q, k, lse, scale)`` is the causal profile of the last rows: q [B, R, H, D] are the queries of the last R of
the M keys k [B, M, G, D]. It returns per key the sum of p over the R rows (vertical [B, H, M]) and the sums of p along
diagonals (slash [B, H, M]; index M - 1 is the main diagonal, M - 1 - s the one s keys further back).
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.profile import reference, xla

REDUCE = {"reference": reference.reduce, "xla": xla.reduce}
DIAGONALS = {"reference": reference.diagonals, "xla": xla.diagonals}


def _choose(table: dict, implementation: str | None):
    implementation = "xla" if implementation is None else implementation
    if implementation not in table:
        raise ValueError(f"implementation: expected None or one of {sorted(table)}, got {implementation!r}")
    return table[implementation]


def reduce(operands: dict, options, lse, weights, implementation: str | None = None):
    """(columns [B, H, M], logits [B, N, H]); see the module's docstring."""
    # exp(s - -inf) must not be formed: such rows get a finite stand-in and no weight, in values and gradients
    some = jnp.isfinite(lse)
    columns, logits = _choose(REDUCE, implementation)(
        operands, options, jnp.where(some, lse, 0.0), jnp.where(some, weights, 0.0)
    )
    return columns, jnp.where(some, logits, 0.0)


def column_sums(operands: dict, options, lse, weights, implementation: str | None = None):
    """sum_i weights_i exp(s_ij - lse_i), [B, H, M]."""
    return reduce(operands, options, lse, weights, implementation)[0]


def mean_logits(operands: dict, options, lse, implementation: str | None = None):
    """sum_j exp(s_ij - lse_i) s_ij, [B, N, H]."""
    return reduce(operands, options, lse, jnp.zeros_like(lse), implementation)[1]


def diagonals(q, k, lse, scale: float, implementation: str | None = None):
    """(vertical [B, H, M], slash [B, H, M]); see the module's docstring."""
    return _choose(DIAGONALS, implementation)(q, k, lse, scale)
