"""QuoTA: a video's token budget goes to the frames that can answer ("QuoTA: Query-oriented Token Assignment via CoT Query
Decouple for Long Video Comprehension").

A small model is shown each frame and asked whether it holds what the question is about; p_f is the probability of its
"yes". Frame f gets c_f = int(B w_f) of the budget B, w_f = (100 p_f)^2 / sum (100 p)^2, as a grid of h x w cells: h = w =
floor(sqrt(c_f)), one row more if that still fits. The projected feature map is resized to it:

    "bilinear"  as an image, up as well as down (the published default)
    "average"   adaptive average pooling        "linspace"  rows and columns at equal steps

and, where counts are known on the host, merged (``quota_merge``). All but "bilinear" never give a frame more tokens than
it has: what its share exceeds goes to the other frames in proportion. A line of cells may end in a newline row.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.labels import KIND_NEWLINE, KIND_VISION
from jaxattn.core.reduce import valid_rows
from jaxattn.core.select import gather_tokens
from jaxattn.core.slots import bipartite, merge_tokens, slot_sum
from jaxattn.core.types import Array, Meta, Tokens, contract, expect, operand
from jaxattn.registry import register

RESIZES = ("bilinear", "average", "linspace")


# --------------------------------------------------------------------------------------------------- what frames are worth
def quota_frames(seconds: float) -> int:
    """Frames to sample from a video: 96, and 64 more per hour."""
    return 96 + int(seconds / 3600 * 64)


QUESTIONS = (
    'Query: "{query}". Does answering it require detecting objects or people in the video? Answer yes or no.',
    'Query: "{query}". List the objects and people that a viewer has to find to answer it, separated by commas.',
    "Objects: {objects}. Keep only what is physical and can be seen, separated by commas; answer none if nothing is left.",
)


def decouple(query: str, ask) -> str:
    """The yes-or-no question each frame is asked, found by three questions about the query alone.

    ask: prompt -> answer of a language model. If the query is about visible things, the frame is asked for any of them,
    otherwise whether it is enough to answer."""
    enough = f"{query} Does the image contain sufficient information to answer the question? A. yes, B. no"
    if not re.match(r"\W*yes\b", ask(QUESTIONS[0].format(query=query)), re.IGNORECASE):
        return enough
    listed = ask(QUESTIONS[1].format(query=query))
    found = [x.strip(" .\n\"'") for x in re.split(r"[,\n]", ask(QUESTIONS[2].format(objects=listed)))]
    found = [x for x in dict.fromkeys(found) if x and x.lower() != "none"]
    return f"Does the image contain any object of {', '.join(found)}? A. yes, B. no" if found else enough


def quota_scores(logits: Array, yes: int) -> Array:
    """p [..., F]: probability of the token ``yes`` (the "A") from a model's logits [..., F, V] at the prompts' last row."""
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)[..., yes]


def quota_shares(p: Array, most: float | None = None) -> Array:
    """w [..., F], (100 p)^2 scaled to sum 1. most: no share exceeds it (frames that would get exactly it, and what they
    exceed it by goes to the others in proportion); below 1 / F nothing can be redistributed and every share is ``most``."""
    w = jnp.square(100 * jnp.asarray(p, jnp.promote_types(jnp.asarray(p).dtype, jnp.float32)))
    total = w.sum(-1, keepdims=True)
    frames = w.shape[-1]
    w = jnp.where(total > 0, w / jnp.where(total > 0, total, 1), 1 / frames)
    if most is None:
        return w

    def spread(full):
        rest = jnp.where(full, 0, w)
        left = jnp.maximum(1 - most * full.sum(-1, keepdims=True), 0)
        mass = rest.sum(-1, keepdims=True)
        return jnp.where(mass > 0, rest * left / jnp.where(mass > 0, mass, 1), 0)

    # Each pass fills at least one more frame, or changes nothing.
    full = jax.lax.fori_loop(0, frames, lambda _, full: full | (spread(full) >= most), jnp.zeros(w.shape, bool))
    return jnp.where(full, most, spread(full))


def quota_counts(p: Array, total: int, most: int | None = None) -> Array:
    """c int32 [..., F]: tokens of each frame, int(total w); frames with 0 are dropped. most: tokens a frame has."""
    w = quota_shares(p, None if most is None else most / total)
    # A hair up: shares that are whole in exact arithmetic stay whole in float32.
    return jnp.floor(total * w * (1 + 1e-6)).astype(jnp.int32)


def quota_grid(count: Array) -> tuple[Array, Array]:
    """(rows, columns) int32 of the grids for ``count`` tokens."""
    count = jnp.asarray(count, jnp.int32)
    side = jnp.floor(jnp.sqrt(count.astype(jnp.float32))).astype(jnp.int32)
    side = jnp.where(side * side > count, side - 1, side)  # of a square root rounded up
    more = (side * side < count) & ((side + 1) * side <= count)
    return side + more, side


# ------------------------------------------------------------------------------------------------------------- resizing
def _places(counts: Array, total: int, newlines: bool):
    """Where each of ``total`` output rows lies: (frame, row, column, is newline, valid), each [total], of counts [F]."""
    h, w = quota_grid(counts)
    wide = w + newlines
    ends = jnp.cumsum(h * wide)
    at = jnp.arange(total)
    frame = jnp.minimum(jnp.searchsorted(ends, at, side="right"), counts.shape[0] - 1)
    inside = at - (ends[frame] - (h * wide)[frame])
    across = jnp.maximum(wide[frame], 1)
    row, col = inside // across, inside % across
    return frame, row, col, (col == w[frame]) & bool(newlines), at < ends[-1], h[frame], w[frame]


def _between(i, m, n: int):
    """(low, high, weight of high) on an axis of n cells for cell i of m, half-pixel centres, edges clamped."""
    source = jnp.maximum((i + 0.5) * n / jnp.maximum(m, 1) - 0.5, 0)
    low = jnp.minimum(source.astype(jnp.int32), n - 1)
    return low, jnp.minimum(low + 1, n - 1), source - low


def quota_resize(x: Array, counts: Array, total: int, *, resize: str = "bilinear", newline: Array | None = None):
    """Frames resized to their grids and laid end to end.

    Args:
      x: [F, h, w, C] projected maps.  counts: int32 [F], tokens of each frame.  total: static number of rows.
      resize: "bilinear" | "average" | "linspace".  newline: [C], appended to each line of cells, or None.
    Returns: (rows [total, C], {"frame", "row", "col", "newline", "valid"}: int32 and bool [total]).
    """
    expect("resize", repr(resize), f"one of {RESIZES}", resize in RESIZES)
    frames, n, m, _ = x.shape
    frame, row, col, ends, valid, h, w = _places(counts, total, newline is not None)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cell = lambda i, j: wide[frame, i, j]  # noqa: E731
    if resize == "bilinear":
        (r0, r1, fr), (c0, c1, fc) = _between(row, h, n), _between(col, w, m)
        fr, fc = fr[:, None], fc[:, None]
        out = (cell(r0, c0) * (1 - fc) + cell(r0, c1) * fc) * (1 - fr) + (cell(r1, c0) * (1 - fc) + cell(r1, c1) * fc) * fr
    elif resize == "linspace":
        pick = lambda i, m, n: jnp.minimum((i * (n - 1)) // jnp.maximum(m - 1, 1), n - 1)  # noqa: E731
        out = cell(pick(row, h, n), pick(col, w, m))
    else:  # sums of the frame's map up to each corner: a bin is four of them
        corner = jnp.pad(jnp.cumsum(jnp.cumsum(wide, 1), 2), ((0, 0), (1, 0), (1, 0), (0, 0)))
        bins = lambda i, m, n: (i * n // jnp.maximum(m, 1), jnp.minimum(-(-(i + 1) * n // jnp.maximum(m, 1)), n))  # noqa: E731
        (r0, r1), (c0, c1) = bins(row, h, n), bins(col, w, m)
        c0, c1 = jnp.minimum(c0, m), jnp.minimum(c1, m)
        at = lambda i, j: corner[frame, i, j]  # noqa: E731
        area = jnp.maximum((r1 - r0) * (c1 - c0), 1)[:, None]
        out = (at(r1, c1) - at(r0, c1) - at(r1, c0) + at(r0, c0)) / area
    if newline is not None:
        out = jnp.where(ends[:, None], newline.astype(out.dtype), out)
    out = jnp.where(valid[:, None], out, 0).astype(x.dtype)
    return out, {"frame": frame, "row": row, "col": col, "newline": ends & valid, "valid": valid}


def quota_merge(x: Array, count: int, *, lines: tuple[int, int] | None = None) -> Array:
    """A frame merged to ``count`` rows by repeated bipartite matching, sizes as weights.

    x: [N, C].  lines: (rows, columns) of the map: match along each row first, then along each column, which leaves
    floor(sqrt(count)) of both; None: match all."""
    if lines is not None:
        h, w = lines
        side = max(1, math.isqrt(count))
        x = jax.vmap(lambda line: quota_merge(line, min(w, side)))(x.reshape(h, w, -1))
        x = jax.vmap(lambda line: quota_merge(line, min(h, side)), in_axes=1, out_axes=1)(x)
        return x.reshape(-1, x.shape[-1])
    expect("count", count, f"between 1 and the {x.shape[0]} rows", 1 <= count <= x.shape[0])
    x, size = x[None], jnp.ones((1, x.shape[0]), jnp.promote_types(x.dtype, jnp.float32))
    while x.shape[1] > count:
        slot, order = bipartite(x, min(x.shape[1] // 2, x.shape[1] - count))
        left = order.shape[1]
        x = merge_tokens(x, slot, left, weight=size)
        size = slot_sum(size, slot, left)
    return x[0]


# --------------------------------------------------------------------------------------------------------------- record
@contract
class _QuoTA:
    total: int
    scores: object = operand("array")
    grid: tuple = (27, 27)
    resize: str = "bilinear"
    newline: object = operand("array", None)

    def check(self):
        expect("total", self.total, "a positive number of tokens", self.total >= 1)
        expect("resize", repr(self.resize), f"one of {RESIZES}", self.resize in RESIZES)

    def rows(self, n):
        # Lines of w cells get one newline each: at most one per cell, and far fewer for grids worth having.
        return self.total if self.newline is None else self.total + self.lines(n)

    def lines(self, n: int) -> int:
        """Most lines that frames of ``n`` rows in all can have for the budget: equal square grids."""
        frames = n // (self.grid[0] * self.grid[1])
        return min(self.total, math.isqrt(self.total * frames) + frames)

    def apply(self, params, state, tokens, evidence, ctx):
        (b, n, c), (h, w) = tokens.x.shape, self.grid
        frames = n // (h * w)
        expect("grid", self.grid, f"a grid that divides the {n} rows into frames", frames * h * w == n and frames >= 1)
        scores = jnp.broadcast_to(params["scores"], (b, frames))
        counts = quota_counts(scores, self.total, None if self.resize == "bilinear" else h * w)
        maps = jnp.where(valid_rows(tokens)[..., None], tokens.x, 0).reshape(b, frames, h, w, c)
        rows = self.rows(n)
        one = lambda x, k: quota_resize(x, k, rows, resize=self.resize, newline=params.get("newline"))  # noqa: E731
        x, place = jax.vmap(one)(maps, counts)
        valid = place.pop("valid")
        ends = place.pop("newline")
        source = place["frame"] * h * w  # order in time: a frame's rows come with the frame's first
        order = gather_tokens(jnp.broadcast_to(tokens.meta.pos, (b, n)), jnp.minimum(source, n - 1))
        pos = order + jnp.arange(rows) - jnp.argmax(place["frame"][..., None] == jnp.arange(frames), axis=1)[
            jnp.arange(b)[:, None], place["frame"]]  # fmt: skip
        kind = jnp.where(ends, KIND_NEWLINE, KIND_VISION)
        labels = {name: jnp.zeros((b, rows), jnp.int32) for name in tokens.meta.labels}
        meta = Meta(pos.astype(jnp.int32), valid, labels=labels | {k: v.astype(jnp.int32) for k, v in place.items()}
                    | {"kind": kind.astype(jnp.int32)})  # fmt: skip
        return Tokens(x, meta, jnp.full((b, n), -1, jnp.int32)), state, {"counts": counts}


@register("tokens")
def quota(total: int, scores, grid: tuple[int, int] = (27, 27), resize: str = "bilinear", newline=None):
    """Resize each frame to its share of ``total`` tokens. For the site "project", frames laid end to end.

    Args:
      total: tokens of the whole video (published: 64 frames' worth of 196).
      scores: [F] or [B, F], p of each frame (``quota_scores``); an operand, new scores compile nothing.
      grid: (rows, columns) of a frame's map.  resize: "bilinear", "average" or "linspace".
      newline: [C], the row put behind each line of cells, or None.
    Rows that leave carry the labels "frame", "row", "col" and "kind"; those behind the last used one are not valid.
    """
    return _QuoTA(total, np.asarray(scores, np.float32), tuple(grid), resize, newline)
