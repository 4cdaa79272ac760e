"""VFlowOpt: importance by what the tower's global tokens attend to, and pruning that recycles ("VFlowOpt: A Token Pruning
Framework for LMMs with Visual Information Flow-Guided Optimization").

Importance, in one layer with A the heads' mean map and E_j the entropy of patch j's grey values:

    g_j = mean_i A_ij,   G = {i: g_i > t mean g},   s_j = mean_{i in G} A_ij + alpha softmax(E)_j

Of N tokens, reduce = round(N (1 - r0)) must go; the reduce + N / a^2 least important are grouped by cells of a x a
patches (base image and high-resolution map apart), and each group becomes one token, sum s x / sum s, in the place of its
most important member. In the language model the same s decides again, twice, by ratio. The last ratio follows from the
others and the wanted average T over 28 layers: ``last_ratio``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.artifact import load
from jaxattn.core.reduce import check_budget, choose, dispose, evidence_rows, reduce_mask, reduce_merge, valid_rows
from jaxattn.core.search import Search, maximise
from jaxattn.core.select import forbid, rank_of
from jaxattn.core.slots import compact, merge_tokens
from jaxattn.core.types import Array, Need, Tokens, contract, expect, operand
from jaxattn.registry import register
from jaxattn.tokens.staged import stage_sites

THRESHOLD = "vflowopt.threshold"  # the fact that tells the tower's global rows where the threshold is an operand


# ----------------------------------------------------------------------------------------------------------- importance
def patch_entropy(image: Array, patch: int) -> Array:
    """[B, N] Shannon entropy in bits of the 256 grey levels in each patch; image [B, H, W, channels] in [0, 1]."""
    b, h, w, _ = image.shape
    expect("patch", patch, f"a divisor of the image's sides {(h, w)}", patch >= 1 and h % patch == 0 and w % patch == 0)
    grey = jnp.clip(jnp.round(image.astype(jnp.float32).mean(-1) * 255), 0, 255).astype(jnp.int32)
    cells = grey.reshape(b, h // patch, patch, w // patch, patch).swapaxes(2, 3).reshape(-1, patch * patch)
    counts = jax.vmap(lambda row: jnp.zeros(256).at[row].add(1.0))(cells) / patch**2
    return (jax.scipy.special.entr(counts).sum(-1) / math.log(2)).reshape(b, -1)


def global_rows(received: Array, threshold, valid: Array | None = None) -> Array:
    """bool [B, N]: rows whose received attention [B, N] is above ``threshold`` times the mean; all where none is."""
    valid = jnp.ones(received.shape, bool) if valid is None else jnp.broadcast_to(valid, received.shape)
    mean = jnp.where(valid, received, 0).sum(-1, keepdims=True) / jnp.maximum(valid.sum(-1, keepdims=True), 1)
    chosen = (received > threshold * mean) & valid
    return jnp.where(chosen.any(-1, keepdims=True), chosen, valid)


def vflowopt_importance(attention: Array, threshold, *, entropy: Array | None = None, alpha=0.0) -> Array:
    """[B, N] importance from the heads' mean map [B, N, N] of one layer; entropy: [B, N] of ``patch_entropy``."""
    rows = global_rows(attention.mean(1), threshold).astype(attention.dtype)
    given = jnp.einsum("bi,bij->bj", rows / rows.sum(-1, keepdims=True), attention)
    return given if entropy is None else given + alpha * jax.nn.softmax(entropy, -1)


@contract
class _GlobalRows:
    """Row weights of a Need: an even mean over the rows that receive much in the same layer. threshold: None, the fact
    ``THRESHOLD``, which a record's operand gives."""

    threshold: float | None
    given: Need

    def __call__(self, meta, evidence):
        threshold = evidence[THRESHOLD] if self.threshold is None else self.threshold
        rows = global_rows(evidence[self.given.name], threshold, meta.valid).astype(jnp.float32)
        return rows / jnp.maximum(rows.sum(-1, keepdims=True), 1)


def importance_need(layer: int, threshold: float | None) -> Need:
    """The Need that answers with the importance: attention given by the global rows of tower layer ``layer``."""
    received = Need("received", what="received", at=f"vision.{layer}", rows="all")
    rows = _GlobalRows(threshold, received)
    return Need("importance", what="received", at=f"vision.{layer}", rows=rows, merged="max")


# ------------------------------------------------------------------------------------------------------------ recycling
def cells_of(maps: tuple[tuple[int, int], ...], cell: float) -> tuple[np.ndarray, int]:
    """(int32 [N], count): the cell of each token of maps (rows, columns) that lie one after the other in raster order."""
    found, start = [], 0
    for h, w in maps:
        across = math.floor((w - 1) / cell) + 1
        rows, cols = np.floor(np.arange(h) / cell), np.floor(np.arange(w) / cell)
        found.append((start + rows[:, None] * across + cols[None]).reshape(-1))
        start += (math.floor((h - 1) / cell) + 1) * across
    return np.concatenate(found).astype(np.int32), start


def recycle_counts(n: int, ratio: float, cell: float) -> tuple[int, int]:
    """(untouched, low): how many of ``n`` tokens stay as they are, and how many are grouped."""
    low = min(n, round(n * (1 - ratio)) + int(n / cell**2))
    return n - low, low


def leaders(importance: Array, high, group: Array, cells: int, valid: Array) -> tuple[Array, Array, Array]:
    """(the ``high`` most important tokens bool [B, N]; the token in whose place each one goes on int32 [B, N]: itself, or of
    the others of its cell ``group`` [N] the most important, the first of equals; bool [B, N], the tokens that go on)."""
    b, n = importance.shape
    top = (rank_of(forbid(importance, ~valid)) < high) & valid
    rest = valid & ~top
    lead = jnp.full((b, cells), -jnp.inf).at[:, group].max(jnp.where(rest, importance, -jnp.inf))
    best = rest & (importance == lead[:, group])
    first = jnp.full((b, cells), n).at[:, group].min(jnp.where(best, jnp.arange(n), n))
    leader = jnp.where(rest, first[:, group], jnp.arange(n))
    return top, leader, top | (rest & (leader == jnp.arange(n)))


def recycle_in_place(x: Array, importance: Array, ratio, cell, maps: tuple[tuple[int, int], ...], *,
                     valid: Array | None = None):
    """``recycle`` with every row in its place, for a ratio and a cell that may be traced: (rows [B, N, C], slot int32 [B, N],
    keep bool [B, N])."""
    b, n = importance.shape
    valid = jnp.ones((b, n), bool) if valid is None else valid
    place = lambda size: jnp.floor(jnp.arange(size) / cell).astype(jnp.int32)  # noqa: E731
    group, start = [], 0
    for h, w in maps:
        group.append((start + place(h)[:, None] * w + place(w)).reshape(-1))  # numbered with gaps: sides are at least 1
        start += h * w
    expect("maps", maps, f"grids of {n} tokens together", start == n)
    low = jnp.minimum(n, jnp.round(n * (1 - ratio)) + jnp.floor(n / cell**2))
    top, leader, keep = leaders(importance, n - low, jnp.concatenate(group), n, valid)
    slot = jnp.where(valid, leader, -1).astype(jnp.int32)
    return merge_tokens(x, slot, n, weight=jnp.where(top, 1.0, jnp.maximum(importance, 1e-20))), slot, keep


def recycle(x: Array, importance: Array, ratio: float, cell: float, maps: tuple[tuple[int, int], ...], *,
            valid: Array | None = None):
    """Prune with recycling.

    Args:
      x: [B, N, C].  importance: [B, N].  ratio: r0, the share to keep (about).  cell: side of a cell in patches, any
        number above 0.  maps: (rows, columns) of each map, N in all.  valid: bool [B, N].
    Returns: (rows [B, M, C] in their order, slot int32 [B, N], index int32 [B, M], valid bool [B, M]), M the number of
      untouched tokens plus the number of cells or of grouped tokens, whichever is less.
    """  # fmt: skip
    b, n = importance.shape
    group, cells = cells_of(maps, cell)
    expect("maps", maps, f"grids of {n} tokens together", len(group) == n)
    high, low = recycle_counts(n, ratio, cell)
    valid = jnp.ones((b, n), bool) if valid is None else valid
    top, leader, keep = leaders(importance, high, group, cells, valid)
    rows = high + min(cells, low)
    index, live = compact(keep, rows)
    place = jnp.cumsum(keep, -1) - 1
    slot = jnp.where(valid, jnp.take_along_axis(place, leader, axis=-1), -1).astype(jnp.int32)
    weight = jnp.where(top, 1.0, jnp.maximum(importance, 1e-20))
    return merge_tokens(x, slot, rows, weight=weight), slot, index, live


@contract
class _VFlowOpt:
    ratio: float = 0.2651
    cell: float = 15.58
    threshold: float = 34.76
    layer: int = -2
    maps: tuple | None = None
    recycles: bool = True
    alpha: float = 0.0
    positions: str = "original"

    def check(self):
        check_budget(1, "keep", self.positions)
        expect("ratio", self.ratio, "a share in (0, 1]", 0 < self.ratio <= 1)
        expect("cell", self.cell, "a side of at least 1 patch", self.cell >= 1)

    def needs(self):
        return (importance_need(self.layer, self.threshold),)

    def grids(self, n):
        side = math.isqrt(n)
        expect("maps", self.maps, f"(rows, columns) of the {n} tokens", self.maps is not None or side * side == n)
        return ((side, side),) if self.maps is None else self.maps

    def rows(self, n):
        if not self.recycles:
            return max(1, n - round(n * (1 - self.ratio)))
        high, low = recycle_counts(n, self.ratio, self.cell)
        return high + min(cells_of(self.grids(n), self.cell)[1], low)

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        s = evidence_rows(evidence, "importance", tokens)
        if self.alpha:
            s = s + self.alpha * novelty(evidence, n)
        if not self.recycles:
            return dispose(tokens, choose(s, self.rows(n), valid), self.rows(n), "keep", self.positions), state, {}
        x, slot, index, live = recycle(tokens.x, s, self.ratio, self.cell, self.grids(n), valid=valid)
        return reduce_merge(tokens, x, slot, index, live, positions=self.positions), state, {"scores": s}


def novelty(evidence: dict, n: int) -> Array:
    """[B, n]: softmax of the patches' entropies, from the fact "image"."""
    expect("evidence", "no image", "the entry 'image', which alpha needs", evidence.get("image") is not None)
    image = evidence["image"]
    return jax.nn.softmax(patch_entropy(image, math.isqrt(image.shape[1] * image.shape[2] // n)), -1)


@contract
class _InPlace:
    """``_VFlowOpt`` that recycles with every row in its place: all numbers are operands, so one program serves a search."""

    ratio: float = operand("scalar", 0.2651)
    cell: float = operand("scalar", 15.58)
    threshold: float = operand("scalar", 34.76)
    alpha: float = operand("scalar", 0.0)
    layer: int = -2
    maps: tuple | None = None

    check, grids = _VFlowOpt.check, _VFlowOpt.grids
    positions = "original"

    def needs(self):
        return (importance_need(self.layer, None),)

    def facts(self, params):
        return {THRESHOLD: params["threshold"]}

    def rows(self, n):
        return n

    def apply(self, params, state, tokens, evidence, ctx):
        n, valid = tokens.x.shape[1], valid_rows(tokens)
        s = evidence_rows(evidence, "importance", tokens) + params["alpha"] * novelty(evidence, n)
        x, slot, keep = recycle_in_place(tokens.x, s, params["ratio"], params["cell"], self.grids(n), valid=valid)
        index = jnp.broadcast_to(jnp.arange(n), keep.shape)
        return reduce_merge(tokens, x, slot, index, keep), state, {"scores": s}


@register("tokens")
def vflowopt(ratio: float = 0.2651, cell: float = 15.58, threshold: float = 34.76, layer: int = -2,
             maps: tuple | None = None, recycles: bool = True, alpha: float = 0.0, positions: str = "original",
             artifact: str | None = None, mode: str = "keep"):  # fmt: skip
    """Prune image tokens on their way to the language model and recycle what goes. For the sites "vision", "project".

    The defaults are the published result for a quarter of the tokens on average; for a tenth ratio 0.1166, cell 17.39,
    threshold 39.26, for a half 0.7233, 11.76, 28.68.
    Args:
      ratio: r0.  cell: a, patches per side of a cell.  threshold: t of the global tokens.
      layer: of the tower, whose attention counts.  maps: (rows, columns) of base image and high-resolution map, one
        after the other; None: one square.  recycles: False prunes only (videos, single plain images).
      alpha: weight of the patches' grey-level entropy.  positions: rotary positions "original" or "fresh".
      artifact: a file of ``vflowopt_settings``, in place of ratio, cell, threshold, layer and alpha.
      mode: "keep", or "mask": every row in its place and all numbers operands of one program; it recycles and leaves
        positions as they are.
    """
    if artifact is not None:
        found = load(artifact, "vflowopt_settings")[0]
        ratio, cell, threshold, alpha = (float(found[x]) for x in ("ratio", "cell", "threshold", "alpha"))
        layer = int(found["layer"])
    check_budget(1, mode)
    if mode == "mask":
        plain = recycles and positions == "original"
        expect("recycles, positions", (recycles, positions), "True and 'original' in mode 'mask'", plain)
        return _InPlace(ratio, cell, threshold, alpha, layer, maps)
    return _VFlowOpt(ratio, cell, threshold, layer, maps, recycles, alpha, positions)


# ---------------------------------------------------------------------------------------------------- language model
def last_ratio(average: float, first: float, second: float, *, layers: tuple[int, int, int] = (9, 9, 10)) -> float:
    """r2 that makes the mean share of tokens over the layers ``average``, at most 1: ``layers`` numbers of layers run at
    r0 = ``first``, r0 r1 (r1 = ``second``) and r0 r1 r2."""
    a, b, c = layers
    return min(1.0, (sum(layers) * average - a * first - b * first * second) / (c * first * second))


def most_important(tokens: Tokens, evidence: dict, ratio) -> Array:
    """bool [B, N]: the share ``ratio`` of the valid rows, at least one."""
    valid = valid_rows(tokens)
    count = jnp.maximum(jnp.floor(valid.sum(-1) * ratio + 1e-3), 1).astype(jnp.int32)
    return choose(evidence_rows(evidence, "importance", tokens), count, valid)


@contract
class _VFlowOptCut:
    ratio: float
    layer: int
    threshold: float

    def needs(self):
        return (importance_need(self.layer, self.threshold),)

    def rows(self, n):
        return max(1, int(n * self.ratio + 1e-3))

    def apply(self, params, state, tokens, evidence, ctx):
        keep = most_important(tokens, evidence, self.ratio)
        return dispose(tokens, keep, self.rows(tokens.x.shape[1])), state, {}


@contract
class _MaskedCut:
    """``_VFlowOptCut`` with every row in its place: share and threshold are operands."""

    ratio: float = operand("scalar", 1.0)
    threshold: float = operand("scalar", 34.76)
    layer: int = -2

    needs, facts = _InPlace.needs, _InPlace.facts

    def rows(self, n):
        return n

    def apply(self, params, state, tokens, evidence, ctx):
        return reduce_mask(tokens, most_important(tokens, evidence, params["ratio"])), state, {}


@contract
class _VFlowOptStages:
    ratios: tuple = (0.983, 0.877)
    layers: tuple | None = None
    layer: int = -2
    threshold: float = 34.76
    mode: str = "keep"

    def check(self):
        check_budget(1, self.mode)
        ok = len(self.ratios) >= 1 and all(0 < r <= 1 for r in self.ratios)
        expect("ratios", self.ratios, "shares in (0, 1]", ok)
        ok = len(self.ratios) == (2 if self.layers is None else len(self.layers))
        expect("ratios", self.ratios, "one per cut, two by default", ok)

    def sites(self, layers):
        return stage_sites(self.layers, (9, 18), 28, layers)

    def schedule(self, layers):
        cut = _MaskedCut if self.mode == "mask" else _VFlowOptCut
        sites = zip(self.sites(layers), self.ratios, strict=True)
        return tuple((site, cut(ratio=r, layer=self.layer, threshold=self.threshold)) for site, r in sites)


@register("tokens")
def vflowopt_stages(ratios: tuple[float, ...] = (0.983, 0.877), layers: tuple[int, ...] | None = None, layer: int = -2,
                    threshold: float = 34.76, mode: str = "keep", artifact: str | None = None):
    """Drop image tokens inside the language model by the tower's importance (site "llm"), behind ``vflowopt``.

    Args:
      ratios: shares of the rows at each cut that stay.  layers: numbers of layers done when the cuts happen; None: the
        published 9 and 18 of 28, scaled to the depth.
      layer, threshold: as given to ``vflowopt``.  mode: "keep" (gather) or "mask"; rotary positions stay.
      artifact: a file of ``vflowopt_settings``, in place of ratios, layers, layer and threshold.
    """
    if artifact is not None:
        found = load(artifact, "vflowopt_settings")[0]
        ratios, layers = tuple(map(float, found["ratios"])), tuple(map(int, found["layers"]))
        layer, threshold = int(found["layer"]), float(found["threshold"])
    return _VFlowOptStages(ratios, layers, layer, threshold, mode)


# ------------------------------------------------------------------------------------------------------------- search
def last_token_agreement(pruned: Array, full: Array) -> Array:
    """Sum over samples of the cosine of the prompt's last hidden row with and without pruning, [B, C] each; a row that is
    not finite counts 0."""
    expect("pruned", f"shape {pruned.shape}", f"the shape of full, {full.shape}", pruned.shape == full.shape)
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (pruned, full))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.nan_to_num((a * b).sum(-1) / norms, nan=0.0, posinf=0.0, neginf=0.0).sum()


def search_bounds(average: float) -> dict[str, tuple[float, float]]:
    """Ranges of the five settings for a mean share ``average`` of tokens; the last ratio follows from them."""
    expect("average", average, "a share in (0, 1)", 0 < average < 1)
    return {"ratio": (average, min(1.0, 1.5 * average)), "second": (0.8 / 1.5, 1.0), "threshold": (0.0, 50.0),
            "cell": (3.0, 24.0), "alpha": (-1.0, 1.0)}  # fmt: skip


def vflowopt_reduce(settings: dict[str, float], average: float, *, layer: int = -2, maps: tuple | None = None,
                    layers: tuple[int, ...] | None = None, depth: int = 28, mode: str = "keep") -> dict:
    """{site: record} for a model's ``bind``, of settings as ``vflowopt_search`` finds them.

    depth: layers of the language model, which the last ratio's budget is counted over; the rest as in the factories (mode
    "mask": the same values from one program for all settings)."""
    ends = (*stage_sites(layers, (9, 18), 28, depth), depth)
    spans = tuple(b - a for a, b in zip((0, *ends), ends, strict=False))
    third = last_ratio(average, settings["ratio"], settings["second"], layers=spans)
    expect("settings", settings, f"ratios that leave something for the last layers within {average}", third > 0)
    own = {name: settings[name] for name in ("ratio", "cell", "threshold", "alpha")}
    first = vflowopt(**own, layer=layer, maps=maps, mode=mode)
    stages = vflowopt_stages((settings["second"], third), layers, layer, settings["threshold"], mode)
    return {"vision": first, "llm": stages}


def vflowopt_search(agreement, average: float, *, calls: int = 300, initial: int = 27, seed: int = 42,
                    bounds: dict[str, tuple[float, float]] | None = None) -> Search:
    """Settings for a mean share ``average`` of image tokens, by Bayesian optimisation.

    Args:
      agreement: settings -> the sum of ``last_token_agreement`` over the calibration samples, of a model bound with
        ``vflowopt_reduce(settings, average, ...)``.  bounds: {name: (low, high)} in place of ``search_bounds``.
      calls: evaluations, the first ``initial`` of them at random.
    Returns a Search; ``.best`` is (settings, value), plain numbers to be stored as they are.
    """
    return maximise(agreement, search_bounds(average) if bounds is None else bounds, calls=calls, initial=initial, seed=seed)


@register("conversion")
def vflowopt_settings(model, batches, key=None, *, average: float = 0.25, calls: int = 300, initial: int = 27,
                      seed: int = 42, layer: int = -2):
    """Search ``vflowopt``'s settings for a trained model ("VFlowOpt").

    Args:
      model: a ``core.types.Trained``.  batches: of its data; each is run once per evaluation.  key: unused.
      average: mean share of the image tokens over the language model's layers.  calls, initial, seed: of ``vflowopt_search``.
      layer: of the tower, whose attention counts.
    Returns: (model, {ratio, cell, threshold, alpha, layer, ratios [2], layers [2], agreement: the mean cosine found,
      start: that of the plain settings at the same mean share (it everywhere, the published cell and threshold, no entropy),
      values [calls]}). Settings are operands of one program.
    """  # fmt: skip
    batches, depth = list(batches), model.layers["llm"]
    whole = [model.run(batch).hidden for batch in batches]
    samples = sum(len(x) for x in whole)
    sites = stage_sites(None, (9, 18), 28, depth)

    def ratios(settings):
        ends = (0, *sites, depth)
        spans = tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
        return settings["second"], last_ratio(average, settings["ratio"], settings["second"], layers=spans)

    def agreement(settings):
        if ratios(settings)[1] <= 0:
            return float("nan")  # nothing would be left for the last layers
        reduce = vflowopt_reduce(settings, average, layer=layer, depth=depth, mode="mask")
        return sum(float(last_token_agreement(model.run(batch, reduce=reduce).hidden, full))
                   for batch, full in zip(batches, whole, strict=True)) / samples  # fmt: skip

    start = agreement({"ratio": average, "second": 1.0, "threshold": 34.76, "cell": 15.58, "alpha": 0.0})
    search = vflowopt_search(agreement, average, calls=calls, initial=min(initial, calls), seed=seed)
    best, value = search.best
    return model, {
        **{name: np.float32(best[name]) for name in ("ratio", "cell", "threshold", "alpha")}, "layer": np.int32(layer),
        "ratios": np.asarray(ratios(best), np.float32), "layers": np.asarray(sites, np.int32),
        "agreement": np.float32(value), "start": np.float32(start), "values": np.asarray(search.values, np.float32),
    }  # fmt: skip
