"""Attention without softmax, and with learned key and value biases: the variants that do or do not make sinks.

"When Attention Sink Emerges in Language Models: An Empirical View" (arXiv:2410.10781). With s = q.k / sqrt(D) and the
mask M of zeros and ones, ``pointwise_attention`` weighs values by

    similarity form   phi(s) M                  phi = sigmoid, elu + 1
    kernel form       psi(q).psi(k) / sqrt(D) M   psi = identity, elu + 1, or one two-layer ReLU network for q and k

as they are, or divided by their row sum. ``kv_bias`` prepends one learned key and value to softmax attention. Keys are
transformed on read, so caches hold them as any attention does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.attend import attend_call, merge
from jaxattn.core.gates import scale_rows
from jaxattn.core.linear import row_correct, with_ones
from jaxattn.core.types import Array, Call, Ctx, Part, Spec, State, contract, expect
from jaxattn.registry import register

MAPS = {
    "similarity": {"sigmoid": jax.nn.sigmoid, "elu": lambda x: jax.nn.elu(x) + 1},
    "kernel": {"identity": lambda x: x, "elu": lambda x: jax.nn.elu(x) + 1, "mlp": None},
}


@register("attention")
def pointwise_attention(map="sigmoid", *, form="similarity", normalize=False) -> PointwiseAttention:
    """Attention whose weights are elementwise in the logits, or kernels of queries and keys.

    Args:
      map: form "similarity": "sigmoid" | "elu" (elu + 1);  form "kernel": "identity" | "elu" | "mlp" (trained, the same
        for q, k and all heads).
      normalize: divide by the row sum + 1e-8 where weights are positive; by max(|row sum|, 1) for the signed kernels
        "identity" and "mlp".
    """
    return PointwiseAttention(map, form, normalize)


@contract
class _Map:
    name: str

    def fields(self):
        return frozenset()

    def __call__(self, logits, q, k, row, key):
        return MAPS["similarity"][self.name](logits)


@contract
class PointwiseAttention:
    map: str = "sigmoid"
    form: str = "similarity"
    normalize: bool = False

    def check(self):
        expect("form", self.form, f"one of {sorted(MAPS)}", self.form in MAPS)
        known = MAPS[self.form]
        expect("map", self.map, f"one of {sorted(known)} with form {self.form!r}", self.map in known)

    def init(self, key, spec: Spec) -> dict:
        if self.map != "mlp":
            return {}
        one, two = jax.random.split(key)
        shape = (spec.head_dim, spec.head_dim)
        return {name: jax.random.normal(k, shape) * shape[0] ** -0.5 for name, k in (("mlp_in", one), ("mlp_out", two))}

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        expect("score_mod", call.score_mod, "None: the map is the layer's own", call.score_mod is None)
        gate = call.out_gate
        call = call.replace(normalizer="none", out_gate=None)
        if self.form == "similarity":
            call = call.replace(score_mod=_Map(self.map))
        else:
            feature = self._feature(params)
            views = tuple(view.replace(k=feature(view.k)) for view in call.past)
            call = call.replace(q=feature(call.q), k=feature(call.k), past=views)
        if not self.normalize:
            out = attend_call(call)[0].out
        else:
            views = tuple(view.replace(v=with_ones(view.v)) for view in call.past)
            out = attend_call(call.replace(v=with_ones(call.v), past=views))[0].out
            out, total = out[..., :-1], out[..., -1].astype(jnp.promote_types(out.dtype, jnp.float32))
            signed = self.map in ("identity", "mlp")
            out = row_correct(out, jnp.maximum(jnp.abs(total), 1.0) if signed else total + 1e-8)
        return Part(scale_rows(out, gate), None), state, {}

    def _feature(self, params: dict):
        if self.map != "mlp":
            return MAPS["kernel"][self.map]

        def network(x):
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            return (jax.nn.relu(wide @ params["mlp_in"]) @ params["mlp_out"]).astype(x.dtype)

        return network


@register("attention")
def kv_bias(*, key=True, value=False, per_head=True) -> KVBias:
    """Softmax attention with one learned key k* and value v* that every query sees beside the visible keys.

    Args:
      key: learn k*. Without ``value`` its v* is 0 ("K biases": it only takes mass); without ``key``, v* is added to the
        output ("V biases").
      per_head: one bias per kv head, or one for all. Biases begin as N(0, 0.02) and carry no position.
    """
    return KVBias(key, value, per_head)


@contract
class KVBias:
    key: bool = True
    value: bool = False
    per_head: bool = True

    def check(self):
        expect("key", False, "a learned key, or value=True", self.key or self.value)

    def init(self, key, spec: Spec) -> dict:
        heads = spec.kv_heads if self.per_head else 1
        one, two = jax.random.split(key)
        params = {"k": 0.02 * jax.random.normal(one, (heads, spec.head_dim))} if self.key else {}
        if self.value:
            params["v"] = 0.02 * jax.random.normal(two, (heads, spec.value_dim or spec.head_dim))
        return params

    def apply(self, params: dict, state: State, call: Call, ctx: Ctx) -> tuple[Part, State, dict]:
        expect("normalizer", call.normalizer, "'softmax'", call.normalizer == "softmax")
        gate, h = call.out_gate, call.q.shape[2]
        call = call.replace(out_gate=None)
        value = _over_heads(params["v"], h) if self.value else None
        if not self.key:
            part = attend_call(call)[0]
            part = part.replace(out=(part.out + value).astype(part.out.dtype))
        else:
            acc = jnp.promote_types(call.q.dtype, jnp.float32)
            scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
            logit = jnp.einsum("bnhd,hd->bnh", call.q.astype(acc), _over_heads(params["k"], h).astype(acc)) * scale
            if value is None:  # a key without value is mass in the normaliser
                sink = logit if call.sink_logit is None else jnp.logaddexp(logit, call.sink_logit)
                part = attend_call(call.replace(sink_logit=sink))[0]
            else:
                value = jnp.broadcast_to(value, (*logit.shape, value.shape[-1])).astype(acc)
                part = merge(attend_call(call)[0], Part(value, logit))
        return part.replace(out=scale_rows(part.out, gate)), state, {}


def _over_heads(x, h: int) -> Array:
    """[1|G, D] -> [H, D]."""
    return jnp.repeat(x, h // x.shape[0], axis=0)
