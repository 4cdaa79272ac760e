"""DyMU: as many image tokens as an image needs, for a language model that still sees them all ("DyMU: Dynamic Merging and
Virtual Unmerging for Efficient VLMs"). Nothing is trained.

``dymu`` (DToMe), in every layer of the tower between attention and feed-forward: tokens are matched as in ToMe, even with odd
rows by the cosine of their heads' mean keys, [CLS] left out, and an edge above the layer's threshold merges, up to
floor((n - 1) / 2) of them. A merged token is the mean weighted by size, the number of tokens that it stands for, and later
layers add log size of the key to their logits. So the number of tokens that leave differs from image to image.

Thresholds are found on data (``dymu_thresholds``): of a batch of B images the B r_l most similar edges merge, wherever they
are; the threshold of layer l is the similarity of the first edge left, at least 0, averaged over batches.

``dymu_unmerge`` (VTU), in the language model: with u(i) the token that carries position i, its q, k and v stand at i,

    q_i = R_i q_u(i),  k_j = R_j k_u(j),  f = softmax(q k^T) v_u,  out_u = mean of f_i over {i: u(i) = u}

R the rotary embedding at the full positions. Residual stream, output projection and feed-forward run on the merged tokens,
the cache holds the expanded keys and values, and decoding is the plain one.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.core import mask as masks
from jaxattn.core.artifact import load
from jaxattn.core.attend import attend
from jaxattn.core.reduce import reduce_merge, valid_rows
from jaxattn.core.select import gather_tokens
from jaxattn.core.slots import bipartite_above, bipartite_edges, merge_tokens, slot_sum
from jaxattn.core.types import Array, Meta, Need, contract, expect, operand
from jaxattn.registry import register

SCHEDULES = ("constant", "linear", "reverse")


# -------------------------------------------------------------------------------------------------------------- merging
def dtome(x: Array, metric: Array, threshold, *, size: Array | None = None, least: int = 0, first: bool = False,
          valid: Array | None = None):
    """One merge by threshold.

    Args:
      x: [B, N, C].  metric: [B, N, d], the heads' mean keys.  threshold: cosine above which a row merges.
      size: [B, N], tokens that each row stands for (default 1).  least: rows that merge at any rate.
      first: whether a class token, not among the rows, stands in front of them in the pairing of even with odd.
      valid: bool [B, N], in front of the others.
    Returns: (rows [B, N - least, C], size [B, N - least], slot int32 [B, N], index int32 [B, N - least], the row whose
      place each takes, valid bool [B, N - least]).
    """  # fmt: skip
    b, n, _ = x.shape
    size = jnp.ones((b, n), jnp.float32) if size is None else jnp.broadcast_to(size, (b, n))
    padded = _with_first(metric, valid, first)
    slot, order, live = bipartite_above(padded[0], threshold, least=least, protect_first=int(first), valid=padded[1])
    slot = jnp.where(slot[:, first:] >= 0, slot[:, first:] - first, -1)
    index, live = order[:, first:] - first, live[:, first:]
    rows = n - least
    return merge_tokens(x, slot, rows, weight=size), slot_sum(size, slot, rows), slot, index, live


def _with_first(metric, valid, first: bool):
    """(metric, valid) with a class token in front, if there is one; its own metric is never compared."""
    valid = jnp.ones(metric.shape[:2], bool) if valid is None else jnp.broadcast_to(valid, metric.shape[:2])
    pad = lambda a, fill: jnp.pad(a, [(0, 0), (int(first), 0)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)  # noqa: E731
    return pad(metric, 0), pad(valid, True)


def batch_threshold(best: Array, merges: int) -> Array:
    """Similarity of the first edge that does not merge where the ``merges`` most similar of all edges [...] do, at least 0."""
    ranked = jnp.sort(best.reshape(-1))[::-1]
    expect("merges", merges, f"between 0 and the {ranked.shape[0]} edges", 0 <= merges <= ranked.shape[0])
    return jnp.maximum(jnp.append(ranked, -jnp.inf)[merges], 0.0)


def merge_schedule(total: int, layers: int, kind: str = "constant") -> tuple[int, ...]:
    """Merges of each layer that sum to ``total``: evenly, the first layers taking what is left over; "linear" falls from
    twice the mean towards none, "reverse" rises to it."""
    expect("kind", repr(kind), f"one of {SCHEDULES}", kind in SCHEDULES)
    expect("total", total, "0 or more", total >= 0)
    weight = [1] * layers if kind == "constant" else list(range(layers, 0, -1))
    found = [total * w // sum(weight) for w in weight]
    for i in range(total - sum(found)):
        found[i % layers] += 1
    return tuple(found[::-1] if kind == "reverse" else found)


@contract
class _DToMe:
    """The merge of one layer: above ``threshold``, or (``merges``) of the batch's most similar edges, so many per image."""

    threshold: float | None = operand("scalar", None)
    least: int = 0
    merges: int | None = None

    inside = True

    def needs(self):
        return (Need("dymu.keys", what="keys", at="last"),)

    def rows(self, n):
        return n - self.least

    def apply(self, params, state, tokens, evidence, ctx):
        expect("evidence", sorted(evidence) or "none", "the entry 'dymu.keys'", "dymu.keys" in evidence)
        keys, valid = evidence["dymu.keys"], valid_rows(tokens)
        metric = keys.astype(jnp.promote_types(keys.dtype, jnp.float32)).mean(2)
        first = any(name == "special" for name, _, _ in ctx.groups)
        threshold = params.get("threshold")
        if self.merges is not None:
            padded = _with_first(metric, valid, first)
            best, _ = bipartite_edges(padded[0], protect_first=int(first), valid=padded[1])
            threshold = batch_threshold(best, min(len(best) * self.merges, best.size))
        x, size, slot, index, live = dtome(tokens.x, metric, threshold, size=tokens.meta.size, least=self.least, first=first,
                                           valid=valid)  # fmt: skip
        out = reduce_merge(tokens, x, slot, index, live)
        out = out.replace(meta=out.meta.replace(size=jnp.where(live, size, 1.0)))
        return out, state, {"threshold": jnp.asarray(threshold, jnp.float32), "left": live.sum(-1)}


@contract
class _DyMU:
    thresholds: tuple | float = 0.9
    least: tuple | int = 0
    merges: tuple | None = None

    place = "vision"

    def schedule(self, layers):
        def each(name, value):
            value = (value,) * layers if not isinstance(value, tuple) else value
            expect(name, f"{len(value)} of them", f"at most one per layer of the tower, {layers}", len(value) <= layers)
            return value

        least = each("least", self.least)
        merges = each("merges", self.merges)
        thresholds = each("thresholds", self.thresholds if self.merges is None else None)
        return tuple(enumerate(_DToMe(*x) for x in zip(thresholds, least, merges, strict=False)))


@register("tokens")
def dymu(thresholds: tuple[float, ...] | float = 0.9, least: tuple[int, ...] | int = 0, artifact: str | None = None):
    """Merge alike tokens inside every layer of the tower, as many as each image has (site "vision").

    Args:
      thresholds: cosine above which tokens merge, for each layer (those behind the last given do not merge) or for all;
        ``dymu_thresholds`` finds them.
      least: merges that every image makes in a layer, per layer or in each: so much shorter are the arrays. Rows that an image
        merged beyond them stay as invalid rows at the end.
      artifact: a file of ``dymu_thresholds``, in place of thresholds.
    Thresholds are operands of the cuts: others compile nothing. Behind it the language model may run with ``dymu_unmerge``.
    """
    if artifact is not None:
        thresholds = tuple(map(float, load(artifact, "dymu_thresholds")[0]["thresholds"]))
    return _DyMU(thresholds, least)


def dymu_calibration(merges: tuple[int, ...]):
    """As ``dymu``, each layer merging the most similar edges of the whole batch, ``merges`` times as many as it has images;
    the aux of the cuts holds their ``threshold``."""
    return _DyMU(merges=tuple(merges))


@register("conversion")
def dymu_thresholds(model, batches, key=None, *, total: int | None = None, schedule: str = "constant"):
    """Find the thresholds at which a trained model's tower merges ``total`` tokens of an image on average (DyMU).

    Args:
      model: a ``core.types.Trained``.  batches: of its data; within each the most similar edges of all images merge.
      total: merges in all layers, None: half the tokens.  schedule: of ``merge_schedule``.  key: unused.
    Returns: (model, {thresholds [L], their running mean over batches; merges [L]; left, mean tokens that were left}), L the
      tower's layers that the language model reads.
    """
    merges = merge_schedule(model.visual // 2 if total is None else total, model.layers["vision"], schedule)
    record, mean, left, count = dymu_calibration(merges), np.zeros(len(merges)), 0.0, 0
    for batch in batches:
        told = model.run(batch, reduce={"vision": record}).told["vision"]
        count += 1
        found = np.array([told[f"cut.{i}"]["threshold"] for i in range(len(merges))])
        mean += (found - mean) / count
        left += (float(np.mean(told[f"cut.{len(merges) - 1}"]["left"])) - left) / count
    expect("batches", "none", "at least one", count > 0)
    return model, {"thresholds": mean.astype(np.float32), "merges": np.asarray(merges, np.int32), "left": np.float32(left)}


# ------------------------------------------------------------------------------------------------------------ unmerging
@contract
class _Unmerge:
    unmerge: bool = True


@register("steering")
def dymu_unmerge():
    """Virtual unmerging: the language model attends as if merged image tokens stood at all their places (DyMU).

    For prompts behind any method that merges or drops image tokens: a place whose token was dropped is not seen. Costs the
    attention of the full sequence; projections and feed-forward are those of the merged one."""
    return _Unmerge()


def virtual_unmerge(q: Array, k: Array, v: Array, index: Array, rope, *, mask=None) -> Array:
    """One attention over unmerged tokens.

    Args:
      q: [B, U, H, D], k, v: [B, U, G, D] of the U merged tokens, not rotated.  index: int32 [B, N], the token at each
        position 0..N-1.  rope: the rotary embedding (``core.rope.Rope``).  mask: None: causal.
    Returns: [B, U, H, D], the mean over each token's positions.
    """
    tokens, meta = q.shape[1], Meta.of(index.shape[1])
    q, k, v = (gather_tokens(x, index) for x in (q, k, v))
    q, k = (rope.apply(x, jnp.asarray(meta.pos)) for x in (q, k))
    out = attend(q, k, v, mask=masks.causal() if mask is None else mask, q_meta=meta, k_meta=meta).out
    merged = merge_tokens(out.reshape(*out.shape[:2], -1), index, tokens, mode="mean")
    return merged.reshape(len(merged), tokens, *out.shape[2:])


__all__ = [
    "SCHEDULES", "batch_threshold", "dtome", "dymu", "dymu_calibration", "dymu_thresholds", "dymu_unmerge",
    "merge_schedule", "virtual_unmerge",
]  # fmt: skip
