"""YOPO: image rows need a fraction of what a language model computes for text ("Treat Visual Tokens as Text? But Your MLLM
Only Needs Fewer Efforts to See").

No row is dropped. With V the image's rows, four switches act on a trained language model, each by itself:

    window   image rows see, of the image, the w x w patches around them (ahead in raster order as well) and otherwise what
             they saw; text rows see what they saw
    heads    in a head whose mask is 0, probabilities on V are multiplied by 0 for every row, after the softmax and without
             renormalisation, and so are the head's outputs at the rows V
    cut      from layer ``cut`` on the probabilities on V are multiplied by 0 in every head, likewise
    mlp      rows V use the first F / mlp of the F neurons of the feed-forward

The head mask is found on data (``yopo_heads``): a head keeps the image where, of the rows that generate answers, more than
40 % of the samples give it more than ``threshold`` times what they give to text; the first two layers keep all heads.

Where the probabilities were renormalised behind ``cut``, image rows could leave there: ``g_search`` with rates 0 from that
layer on.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.core import mask as masks
from jaxattn.core.artifact import load
from jaxattn.core.labels import KIND_VISION, is_vision
from jaxattn.core.types import Array, Call, Ctx, Meta, Need, State, contract, expect, operand
from jaxattn.registry import register

THRESHOLDS = {10: 0.2, 20: 0.077, 30: 0.035}  # published for 13B: by the heads that stay, of 40, on average over layers


def neighbourhood(mask, window: int, labels=("row", "col")):
    """A mask whose image-to-image part is a square window of ``window`` patches (odd), in both directions of time.

    mask: of all rows, or None.  labels: fields of Meta, the patch's row and column first; others must agree (say "crop").
    """
    expect("window", window, "an odd number of patches per side", window >= 1 and window % 2 == 1)
    both = masks.query_is("kind", KIND_VISION) & masks.key_is("kind", KIND_VISION)
    near, reach = both, (window + 1) // 2
    for name in labels[:2]:
        near = near & masks.window(reach, reach, name)
    for name in labels[2:]:
        near = near & masks.same(name)
    return (~both if mask is None else mask & ~both) | near


@contract
class _Gain:
    """1 for text, a head's gain for the image, whatever their masses."""

    groups: int = 2

    def __call__(self, masses: Array, args: dict) -> Array:
        image = jnp.broadcast_to(args["image"].astype(masses.dtype), masses.shape[:-1])
        return jnp.stack([jnp.ones_like(image), image], -1)


@contract
class _Yopo:
    window: int | None = 5
    kept: tuple | None = operand("heads", None)
    cut: int | None = operand("int", None)
    mlp: int = 1
    gated: bool = False

    def check(self):
        expect("window", self.window, "an odd number of patches, or None", self.window is None or self.window % 2 == 1)
        expect("cut", self.cut, "a layer's number or None", self.cut is None or not isinstance(self.cut, int) or self.cut >= 0)
        expect("mlp", self.mlp, "at least 1", self.mlp >= 1)

    def _image(self, params: dict, ctx: Ctx) -> Array:
        """float32 [H]: what the image keeps in each head of the layer."""
        gain = jnp.asarray(params["kept"])[ctx.layer]
        return gain if self.cut is None else jnp.where(ctx.layer < params["cut"], gain, 0.0)

    def call(self, params: dict, state: State, call: Call, ctx: Ctx) -> Call:
        labels = call.k_meta.labels
        if self.window is not None and ctx.phase in ("train", "prefill") and "kind" in labels:
            fields = ("row", "col", "crop") if "crop" in labels else ("row", "col")
            call = call.replace(mask=neighbourhood(call.mask, self.window, fields))
        if not self.gated:
            return call
        expect("call.gain", call.gain, "None: one method at a time may weigh classes of keys", call.gain is None)

        def grouped(meta: Meta, key: dict) -> dict:
            seen = is_vision(meta)
            seen = seen[..., None] if seen.ndim == 2 else jnp.moveaxis(seen, 1, 2)
            return {**key, "group": jnp.asarray(seen).astype(jnp.int32)}

        return call.map_keys(grouped).replace(gain=_Gain(), gain_args={"image": self._image(params, ctx)})

    def heads(self, params: dict, state: State, out: Array, meta: Meta, ctx: Ctx) -> tuple[Array, State]:
        if not self.gated or ctx.phase not in ("train", "prefill"):
            return out, state
        kept = jnp.asarray(params["kept"])[ctx.layer].astype(out.dtype)[:, None]
        return jnp.where(jnp.asarray(is_vision(meta))[..., None, None], out * kept, out), state

    def neurons(self, group: str, hidden: int) -> int:
        return hidden // self.mlp if group == "vision" else hidden


@register("steering")
def yopo(window: int | None = 5, heads=None, cut: int | None = None, mlp: int = 2, artifact: str | None = None):
    """Spare a language model computation for the rows of an image ("Treat Visual Tokens as Text? But Your MLLM Only Needs
    Fewer Efforts to See").

    Args:
      window: patches per side of the window in which image rows see each other, odd; None: as before.
      heads: [L, H], 1 for heads that look at the image (``yopo_heads``); None: all.
      cut: layers from this one (0-based) on take nothing from the image; None: all do. Published: 20 of 32 or 40.
      mlp: image rows use a share 1 / mlp of each feed-forward; 1: all.
      artifact: a file of ``yopo_mask``, in place of heads.
    ``heads`` and ``cut`` are operands: other values compile nothing. Image rows carry the labels kind, row and col.
    """
    if artifact is not None:
        heads = load(artifact, "yopo_mask")[0]["heads"].astype(np.float32)
    return _Yopo(window, heads, cut, mlp, heads is not None or cut is not None)


# ---------------------------------------------------------------------------------------------------------- calibration
def yopo_heads(ratio, threshold: float, *, votes: float = 0.4, first: int = 2) -> np.ndarray:
    """bool [L, H]: heads that keep the image.

    Args:
      ratio: [samples, L, H], attention that the generating rows of a sample give to the image over what they give to all
        other rows, in each head.  threshold: a sample votes for a head where its ratio is above it.
      votes: share of the samples above which a head stays.  first: layers in which all heads stay.
    """
    ratio = np.asarray(ratio)
    expect("ratio", f"shape {ratio.shape}", "[samples, layers, heads]", ratio.ndim == 3 and len(ratio) > 0)
    kept = (ratio > threshold).mean(0) > votes
    kept[:first] = True
    return kept


def threshold_for(ratio, share: float, **rule) -> float:
    """The largest threshold at which ``yopo_heads`` leaves at least ``share`` of all heads."""
    expect("share", share, "in (0, 1]", 0 < share <= 1)
    tried = np.unique(np.concatenate([[0.0], np.asarray(ratio, np.float64).ravel()]))
    low, high = 0, len(tried)  # with tried[low] enough heads stay
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if yopo_heads(ratio, tried[middle], **rule).mean() >= share else (low, middle)
    return float(tried[low])


@contract
class _Answers:
    """Rows that generate: those with the label ``generates``."""

    def __call__(self, meta: Meta, evidence: dict) -> Array:
        return jnp.where(meta.valid, jnp.asarray(meta.labels["generates"]), 0).astype(jnp.float32)


def answer_need(name: str) -> Need:
    """The Need of what generating rows give each key, per layer and head: [L, B, H, M]."""
    return Need(name, what="received", at="llm.*", rows=_Answers(), over_heads=None)


@register("conversion")
def yopo_mask(model, batches, key=None, *, threshold: float | None = None, share: float = 0.5, votes: float = 0.4,
              first: int = 2):
    """Find which heads of a trained model look at the image, from the rows that generate its answers (YOPO).

    Args:
      model: a ``core.types.Trained``.  batches: of its data; each of their rows is a sample.  key: unused.
      threshold: of ``yopo_heads``; None: such that ``share`` of all heads stay.  votes, first: as there.
    Returns: (model, {heads bool [L, H], ratio [samples, L, H], threshold}).
    """  # fmt: skip
    ratio = []
    for batch in batches:
        given = np.asarray(model.run(batch, needs=(answer_need("answers"),)).evidence["answers"], np.float64)
        image, rest = given[..., : model.visual].sum(-1), given[..., model.visual :].sum(-1)
        ratio.append(np.moveaxis(image / np.maximum(rest, 1e-12), 1, 0))
    expect("batches", "none", "at least one", len(ratio) > 0)
    ratio = np.concatenate(ratio)
    threshold = threshold_for(ratio, share, votes=votes, first=first) if threshold is None else threshold
    heads = yopo_heads(ratio, threshold, votes=votes, first=first)
    return model, {"heads": heads, "ratio": ratio.astype(np.float32), "threshold": np.float32(threshold)}


__all__ = ["THRESHOLDS", "answer_need", "neighbourhood", "threshold_for", "yopo", "yopo_heads", "yopo_mask"]
