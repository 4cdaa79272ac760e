"""VAR: attention is moved from sinks to the image, in heads that look at it.

"See What You Are Told: Visual Attention Sink in Large Multimodal Models".

Sinks are found by massive activations, not by attention: a token is one where, in the residual stream that enters the
layer, a sink dimension d of the language model exceeds tau in units of the root mean square,

    phi(x) = max_d |x_d| / sqrt(mean_j x_j^2 + 1e-6) > tau.

They are found for every token at prefill (text and image alike) and frozen: the flag is a side row that lies in the
cache beside k and v. With V the image keys, S_v the sinks among them and S_t the others, a head and query is
*image-centric* where

    sum_{S_v} a / sum_V (a + 1e-6) <= rho   and   sum_V a >= summ,

and then a_j <- keep a_j on both kinds of sinks, what was taken going to V without S_v in proportion to a. Rows keep
their sum. Queries are those after the image; layers without a sink in the image are left alone.

In the released code a flag that spares the last layer is shadowed and has no effect; here it is the argument
``except_last``, on as published. With several images, queries after the last one are eligible.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.core.labels import is_vision
from jaxattn.core.types import Array, Call, Ctx, Meta, State, contract, expect, operand
from jaxattn.registry import register
from jaxattn.steering.classes import over_keys, per_key, redistribute

SINK_DIMS = {"llama-2-7b": (1415, 2533), "llama-2-13b": (2100, 4743)}
REST, TEXT_SINK, IMAGE_SINK, RECEIVER = range(4)  # classes of keys
_PAD = 1e-6  # added to every image key in the head test, as in the released code


def massive(hidden: Array, dims: tuple[int, ...], tau) -> Array:
    """bool [B, N]: rows of hidden [B, N, C] in which one of ``dims`` exceeds tau times the root mean square."""
    expect("dims", dims, f"channels below {hidden.shape[-1]}", all(0 <= d < hidden.shape[-1] for d in dims))
    x = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1) + 1e-6)
    return jnp.max(jnp.abs(x[..., list(dims)]), -1) * scale > tau


def image_centric(sink_mass: Array, image_mass: Array, n_image, rho, summ) -> Array:
    """The two-sided test of a row: little of its image attention on sinks, and enough image attention."""
    portion = sink_mass / jnp.maximum(image_mass + _PAD * n_image, 1e-20)
    return (portion <= rho) & (image_mass >= summ)


def var_reference(a, sink, image, query, *, rho=0.5, summ=0.2, keep=0.6):
    """The edited map, in the paper's terms.

    Args:
      a: [B, H, N, M], rows sum to 1.  sink, image: bool [B, M].  query: bool [B, N], eligible rows.
    Returns: (map [B, H, N, M], selected bool [B, H, N]).
    """
    image, sink = image[:, None, None], sink[:, None, None]
    total = lambda keys: jnp.sum(jnp.where(keys, a, 0), -1)  # noqa: E731
    selected = image_centric(total(sink & image), total(image), image.sum(-1), rho, summ)
    selected &= query[:, None] & jnp.any(sink & image, -1)
    taken, receives = total(sink) * (1 - keep), image & ~sink
    share = jnp.where(receives, a, 0) / jnp.maximum(total(receives), 1e-20)[..., None]
    edited = jnp.where(sink, a * keep, a) + taken[..., None] * share
    return jnp.where(selected[..., None] & (total(receives) > 1e-20)[..., None], edited, a), selected


@contract
class _Gain:
    """Gains of the four classes of keys from a row's class masses."""

    groups: int = 4

    def __call__(self, masses: Array, args: dict) -> Array:
        image = masses[..., IMAGE_SINK] + masses[..., RECEIVER]
        n_image = args["n_image"].astype(masses.dtype)
        on = image_centric(masses[..., IMAGE_SINK], image, n_image, args["rho"], args["summ"]) & args["query"]
        gains = redistribute(masses, (TEXT_SINK, IMAGE_SINK), RECEIVER, args["keep"])
        return jnp.where(on[..., None], gains, 1.0).astype(masses.dtype)


@contract
class _VAR:
    dims: tuple
    tau: float = operand("scalar")
    rho: float = operand("scalar")
    summ: float = operand("scalar")
    keep: float = operand("scalar")
    layers: tuple | None = operand("layers")
    first: int = 0
    except_last: bool = True

    def check(self):
        expect("dims", self.dims, "at least one channel", len(self.dims) > 0)
        expect("keep", self.keep, "a fraction in [0, 1]", not isinstance(self.keep, float) or 0 <= self.keep <= 1)

    def _on(self, params: dict, ctx: Ctx) -> Array:
        layers = jnp.asarray(params["layers"])
        last = layers.shape[0] - 1 if self.except_last else layers.shape[0]
        return layers[ctx.layer] & (ctx.layer >= self.first) & (ctx.layer < last)

    def side(self, params: dict, state: State, meta: Meta, ctx: Ctx) -> dict:
        shape = (*ctx.hidden.shape[:2], 1)
        if ctx.phase == "decode":  # the set of sinks is that of the prompt
            return {"var_sink": jnp.zeros(shape, jnp.float32)}
        found = massive(ctx.hidden, self.dims, params["tau"]) & meta.valid & self._on(params, ctx)
        return {"var_sink": found[..., None].astype(jnp.float32)}

    def call(self, params: dict, state: State, call: Call, ctx: Ctx) -> Call:
        expect("call.gain", call.gain, "None: one method at a time may weigh classes of keys", call.gain is None)

        def sinks(meta, key):
            found = sorted(key) or "no side rows"
            expect("key", found, "the side row 'var_sink', which the cache must keep", "var_sink" in key)
            return key["var_sink"] > 0.5

        image = lambda meta, key: per_key(is_vision(meta))  # noqa: E731
        position = lambda meta, key: jnp.where(per_key(is_vision(meta)), per_key(jnp.asarray(meta.pos)), -1)  # noqa: E731

        def classes(meta, key):
            sink, seen = sinks(meta, key), image(meta, key)
            group = jnp.where(seen, jnp.where(sink, IMAGE_SINK, RECEIVER), jnp.where(sink, TEXT_SINK, REST))
            return {**{k: x for k, x in key.items() if k != "var_sink"}, "group": group.astype(jnp.int32)}

        n_sinks = over_keys(call, lambda meta, key: sinks(meta, key) & image(meta, key))
        after = jnp.asarray(call.q_meta.pos)[..., None] > over_keys(call, position, "max")
        args = {
            "n_image": over_keys(call, image), "query": after & (n_sinks > 0) & self._on(params, ctx),
            "rho": params["rho"], "summ": params["summ"], "keep": params["keep"],
        }  # fmt: skip
        return call.map_keys(classes).replace(gain=_Gain(), gain_args=args)


@register("steering")
def var(dims, *, tau=20.0, rho=0.5, summ=0.2, keep=0.6, layers=None, except_last=True) -> _VAR:
    """VAR, visual attention redistribution ("See What You Are Told: Visual Attention Sink in Large Multimodal Models").

    Args:
      dims: sink dimensions of the language model, channel numbers or a name of ``SINK_DIMS`` ("llama-2-7b",
        "llama-2-13b"). They belong to the base model, not to its fine-tuning.
      tau: activation, in units of the row's root mean square, above which a token is a sink.
      rho: largest share of a row's image attention on sinks, tuned per task in the paper.  summ: least image attention.
      keep: fraction of the attention that sinks keep; 1 changes nothing.
      layers: layer numbers; None for all from the third one.  except_last: spare the last layer.
    tau, rho, summ, keep and layers are operands: changing them compiles nothing. The rows of the image carry the label
    ``kind`` 1. Raises ValueError for an unknown model name or a channel out of range.
    """
    if isinstance(dims, str):
        expect("dims", repr(dims), f"channels or one of {sorted(SINK_DIMS)}", dims in SINK_DIMS)
        dims = SINK_DIMS[dims]
    first = 2 if layers is None else 0
    return _VAR(tuple(dims), float(tau), float(rho), float(summ), float(keep), layers, first, except_last)


__all__ = ["SINK_DIMS", "image_centric", "massive", "var", "var_reference"]
