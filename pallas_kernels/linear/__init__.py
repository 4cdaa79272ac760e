"""Linear attention with decay: a recurrence over tokens, computed in chunks.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T          S: [F, Dv], kept in float32
    o_t = scale * q_t S_t

``linear(operands, options)`` takes plain arrays and knows no method. ``operands`` is a dict:

  q [B, N, H, F], k [B, N, G, F], v [B, N, G', Dv]      floats, G and G' divide H
  log_decay None | [H] | [B|1, N, H] | [B|1, N, H, F]   expected <= 0; -inf forgets everything before the token
  state None | [B, H, F, Dv]                            before the first token; None is zeros

Returns ``(out [B, N, H, Dv] in v's dtype, state [B, H, F, Dv] after the last token, float32 or wider)``. Gradients flow to
every operand and from both outputs; memory is linear in N in both directions. There is no normaliser: a denominator is
one more column of v, whose width need not be a multiple of anything. Only sums of log-decays over some tokens of a chunk
are exponentiated, and those are <= 0: strong decays underflow, they never overflow.

Implementations: "reference" (token by token), "xla" (everything, every backend), "tpu" and "gpu" (Pallas kernels for
float32 and bfloat16 with one dtype for q, k and v; "tpu" holds states of up to 2^19 entries, "gpu" takes arrays of fewer
than 2^31).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

from pallas_kernels._dispatch import choose, kernels
from pallas_kernels.linear import reference, xla

# Bodies that a call without a name may use. The accelerator bodies compile for their targets and agree with the reference
# in interpret mode; each joins once its values and its speed have been measured on a device.
MEASURED = frozenset({"xla"})
IMPLEMENTATIONS = {"reference": reference.linear, "xla": xla.linear} | kernels(__name__, "linear")


@dataclasses.dataclass(frozen=True)
class Options:
    """Static side of a call. ``chunk``: tokens per block of the recurrence, None for what suits the body; the kernels
    take the nearest size they have. Changes speed and memory, not the result."""

    chunk: int | None = None
    scale: float = 1.0


def linear(operands: dict, options: Options, implementation: str | None = None, mesh=None):
    """See the module's docstring. ``implementation=None`` picks the fast path that works here; a named one raises a
    ValueError that says what it does not support. ``mesh``: devices to cut a kernel's call over, None for those of
    ``jax.set_mesh``."""
    operands = {x: a for x, a in operands.items() if a is not None}

    def refusal(name: str) -> str | None:
        return importlib.import_module(f"{__name__}.{name}").unsupported(operands, options)

    names = functools.partial(reference.dims, operands)
    return choose(IMPLEMENTATIONS, MEASURED, implementation, refusal, names, mesh)(operands, options)
