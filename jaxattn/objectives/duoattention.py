"""DuoAttention, trained: which heads need the whole text is learned by one gate per layer and kv head.

"DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads" (arXiv:2410.10819).

Two streams run through the frozen model side by side. The full stream is the model itself; in the mixed stream head g
gives alpha_g * full + (1 - alpha_g) * streaming, where streaming sees sinks and a window. The gates are trained so that
the mixed stream ends where the full one does, on the answers of long recall tasks, with an L1 term that pulls them to
streaming:  mean over answer tokens of mean_d (h_full - h_mixed)^2  +  reg * mean |alpha|.

As released (and unlike the paper's figure), the full part of the mixed stream is the full stream's attention output;
``teacher_forced=False`` computes it from the mixed stream's own q, k, v.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxattn.core import mask as masks
from jaxattn.core.attend import attend_call
from jaxattn.core.types import Array, Call, Part, Spec, State, contract, expect
from jaxattn.registry import register


def clamp(gates: Array) -> Array:
    """Gates in [0, 1]; the derivative is 1 on the closed interval (gates start at 1) and 0 outside."""
    gates = jnp.asarray(gates)
    return jnp.where(gates < 0, 0.0, jnp.where(gates > 1, 1.0, gates))


def streaming_mask(sink: int, recent: int):
    """The mask of a streaming head in training: the first ``sink`` keys and the last ``recent``, itself included."""
    return masks.causal() & (masks.window(recent) | masks.first(sink))


@register("attention")
def duoattention_streams(sink=128, recent=256, *, teacher_forced=True) -> Streams:
    """A layer's attention over a doubled batch: rows [0, B) are the full stream, rows [B, 2B) the mixed one.

    Its trainable parameters are the layer's ``gates`` [G], 1 at the start.

    Args:
      sink, recent: of the streaming mask.
      teacher_forced: the mixed stream's full part is the full stream's output, through which nothing is trained.
    """
    return Streams(sink, recent, teacher_forced)


@contract
class Streams:
    sink: int = 128
    recent: int = 256
    teacher_forced: bool = True

    def check(self):
        expect("sink", self.sink, "at least 0", self.sink >= 0)
        expect("recent", self.recent, "at least 1", self.recent >= 1)

    def init(self, key, spec: Spec) -> dict:
        return {"gates": jnp.ones(spec.kv_heads)}

    def apply(self, params: dict, state: State, call: Call, ctx) -> tuple[Part, State, dict]:
        """Part of both streams; its lse is None, since a mixture of two softmaxes has no common mass."""
        b, n, h, _ = call.q.shape
        expect("call.past", f"{len(call.past)} cached views", "none: gates are trained without a cache", not call.past)
        expect("q", f"batch {b}", "an even number: the full stream, then the mixed one", b % 2 == 0)
        full = attend_call(_rows(call, slice(0, b // 2)))[0].out
        mixed = _rows(call, slice(b // 2, b))
        dense = jax.lax.stop_gradient(full) if self.teacher_forced else attend_call(mixed)[0].out
        mask = streaming_mask(self.sink, self.recent)
        mask = mask if call.mask is None else call.mask & mask
        streaming = attend_call(mixed.replace(mask=mask))[0].out
        gates = clamp(params["gates"])
        alpha = jnp.repeat(gates, h // gates.shape[0])[:, None].astype(jnp.promote_types(call.q.dtype, jnp.float32))
        out = alpha * dense + (1 - alpha) * streaming
        return Part(jnp.concatenate([full, out.astype(full.dtype)])), state, {}


def _rows(call: Call, rows: slice) -> Call:
    """The Call of some batch rows."""
    b = call.q.shape[0]
    cut = lambda x: x if x is None or x.shape[0] != b else x[rows]  # noqa: E731
    sink = call.sink_logit
    sink = cut(sink) if sink is not None and sink.ndim == 3 else sink
    return call.replace(
        q=call.q[rows], k=call.k[rows], v=call.v[rows], q_meta=jax.tree.map(cut, call.q_meta),
        k_meta=jax.tree.map(cut, call.k_meta), key=jax.tree.map(cut, call.key), row=jax.tree.map(cut, call.row),
        bias=cut(call.bias), out_gate=cut(call.out_gate), sink_logit=sink,
    )  # fmt: skip


def distillation(full: Array, mixed: Array, weights: Array) -> Array:
    """Mean over the weighted tokens of mean_d (full - mixed)^2; full, mixed [B, N, C], weights [B, N]."""
    acc = jnp.promote_types(full.dtype, jnp.float32)
    each = jnp.mean((jax.lax.stop_gradient(full).astype(acc) - mixed.astype(acc)) ** 2, -1)
    weights = jnp.asarray(weights, acc)
    return jnp.sum(each * weights) / jnp.maximum(weights.sum(), 1.0)


@register("objective")
def duoattention(reg=0.05) -> Distillation:
    """Distillation of the full stream into the mixed one with an L1 term of weight ``reg`` on the gates.

    ``loss(params, ...)`` reads ``params["gates"]`` [L, G]; it doubles the batch, and ``forward(batch)`` gives an object
    with ``hidden`` [2B, N, C], the rows after the last norm of a model bound to ``duoattention_streams`` with those
    gates. The tokens that count are the batch's ``loss_mask`` [B, N]: the rows that predict the answers."""
    return Distillation(float(reg))


@contract
class Distillation:
    reg: float = 0.05

    def check(self):
        expect("reg", self.reg, "at least 0", self.reg >= 0)

    def loss(self, params: dict, state: State, forward, batch: dict, key) -> tuple[Array, dict]:
        hidden = forward(jax.tree.map(lambda x: jnp.concatenate([x, x]), dict(batch))).hidden
        b = hidden.shape[0] // 2
        distill = distillation(hidden[:b], hidden[b:], batch["loss_mask"])
        gates = clamp(params["gates"])
        size = jnp.mean(jnp.abs(gates))
        return distill + self.reg * size, {"distillation": distill, "gates": size}


def schedule(steps: int = 2000, learning_rate: float = 0.02):
    """Learning rate of a step: up from a tenth over the first fifth of the steps and down to it over the last."""
    ramp = max(steps // 5, 1)

    def rate(step):
        up, down = jnp.maximum((step + 1) / ramp, 0.1), jnp.maximum((steps - step) / ramp, 0.1)
        return learning_rate * jnp.minimum(1.0, jnp.minimum(up, down))

    return rate


@register("conversion")
def duoattention_gates(model, batches, key=None, *, forward, shape, steps=2000, learning_rate=0.02, reg=0.05):
    """Train the gates of a frozen model.

    Args:
      model: pytree of the model's arrays; returned as it came.
      batches: iterable of layout records with ``tokens`` and ``loss_mask`` [B, N], of one shape; repeated if too few.
      key: PRNG key or None; handed to the objective, which draws nothing.
      forward: pure function (model, gates [L, G], batch of 2B rows) -> object with ``hidden`` [2B, N, C].
      shape: (layers, kv heads).  steps, learning_rate, reg: as released; AdamW without weight decay.
    Returns: (model, {"gates": float32 [L, G] in [0, 1], "loss": float32 [steps]}); the gates go to
      ``jaxattn.cache.duoattention``.
    """
    objective, optimizer = duoattention(reg), optax.adamw(schedule(steps, learning_rate), weight_decay=0.0)

    @jax.jit
    def step(model, gates, optimizer_state, batch):
        def loss(gates):
            run = lambda batch: forward(model, clamp(gates), batch)  # noqa: E731
            return objective.loss({"gates": gates}, State(), run, batch, key)

        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(gates)
        update, optimizer_state = optimizer.update(gradient, optimizer_state, gates)
        return jnp.clip(optax.apply_updates(gates, update), 0, 1), optimizer_state, value

    gates = jnp.ones(shape, jnp.float32)
    optimizer_state, losses = optimizer.init(gates), []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        gates, optimizer_state, value = step(model, gates, optimizer_state, batch)
        losses.append(value)
    expect("batches", "no batch", "at least one", bool(losses) or steps == 0)
    return model, {"gates": np.asarray(gates), "loss": np.asarray(losses, np.float32)}


__all__ = [
    "clamp", "distillation", "duoattention", "duoattention_gates", "duoattention_streams", "schedule", "streaming_mask",
]  # fmt: skip
