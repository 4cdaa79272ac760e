"""Any number of pictures in a prompt, each of one or many crops, and where their rows stand in it.

A picture of high resolution is read as crops of the tower's size: a thumbnail and the tiles of a grid (LLaVA-NeXT). The
tiles' patches form one raster, from which the grid's padding is taken off; a learned newline row ends each of its lines.

Rows lie crop by crop, patch by patch; what they are to the language model (their place among the words, padding, line) is
Meta's. So a token method's budget is of the whole prompt, and one that counts crops finds them under the label "crop".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.labels import KIND_NEWLINE, KIND_VISION
from jaxattn.core.reduce import reduce_keep
from jaxattn.core.select import gather_meta
from jaxattn.core.types import Array, Meta, Tokens, data, expect, static

NEWLINES = ("all", "line", "none")


# ------------------------------------------------------------------------------------------------------ one picture
class Layout(NamedTuple):
    """Where the rows of one picture stand: numpy, [crops * patches] each, and the newlines' places [lines].

    place: among the picture's rows (of padding: where its nearest patch stands).  valid: False for padding.
    line: number of the newline that ends a patch's line, -1 where none does.  row, col: in the raster of the thumbnail or of
    all tiles.  crop: number of the crop.  newlines: places of the newline rows.  length: rows in all.
    turns: rotary positions that the picture takes; None: one per row.  inside: {row, col, window} of the patches [P] that a
    tower of pictures of any size reads.
    """

    place: np.ndarray
    valid: np.ndarray
    line: np.ndarray
    row: np.ndarray
    col: np.ndarray
    crop: np.ndarray
    newlines: np.ndarray
    length: int
    turns: int | None = None
    inside: dict | None = None


def blocks(grid: tuple[int, int], merge: int, window: int) -> Layout:
    """A picture of any ``grid`` of patches for a tower that merges blocks of ``merge`` x ``merge``: a row per block, in
    raster order, rotary positions by row and column (M-RoPE). Patches lie block by block; ``window``: patches per side."""
    expect("grid", grid, f"multiples of {merge}", not any(n % merge or n < 1 for n in grid))
    high, wide = (n // merge for n in grid)
    i, j, r, c = (x.reshape(-1) for x in np.indices((high, wide, merge, merge)))
    row, col = i * merge + r, j * merge + c
    number = row // window * -(-grid[1] // window) + col // window if window else np.zeros_like(row)
    found = whole((high, wide))
    return found._replace(turns=max(high, wide), inside=dict(row=row, col=col, window=number))


def whole(grid: tuple[int, int]) -> Layout:
    """A picture of one crop of ``grid`` (rows, columns) patches, without newlines."""
    n = grid[0] * grid[1]
    row, col = np.divmod(np.arange(n), grid[1])
    return Layout(np.arange(n), np.ones(n, bool), np.full(n, -1), row, col, np.zeros(n, int), np.zeros(0, int), n)


def best_pinpoint(size: tuple[int, int], pinpoints) -> tuple[int, int]:
    """Of the (height, width) in ``pinpoints`` the one that shows most of the pixels of a picture of ``size``; the first of
    those that then leave the least empty."""

    def shown(pinpoint):
        scale = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
        pixels = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return pixels, pixels - pinpoint[0] * pinpoint[1]

    return tuple(max(pinpoints, key=shown))


def live_window(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the cells of ``grid`` that a picture of ``size``, fitted and centred, covers."""
    (h, w), (rows, cols) = size, grid
    if w / h > cols / rows:
        margin = (rows - int(round(h * (cols / w), 7))) // 2
        return margin, rows - margin, 0, cols
    margin = (cols - int(round(w * (rows / h), 7))) // 2
    return 0, rows, margin, cols - margin


def tiled(size: tuple[int, int], pinpoints, side: int, grid: tuple[int, int]) -> Layout:
    """A thumbnail and tiles of ``side`` pixels and ``grid`` patches each, for a picture of ``size`` (height, width) pixels.

    The patches of the tiles are one raster of lines, each with a newline behind it, after the thumbnail's.
    """
    high, wide = (s // side for s in best_pinpoint(size, pinpoints))
    (h, w), first = grid, whole(grid)
    top, bottom, left, right = live_window(size, (high * h, wide * w))
    expect("size", size, f"a picture that fills a patch of {(high * h, wide * w)} patches", bottom > top and right > left)
    i, j, r, c = (x.reshape(-1) for x in np.indices((high, wide, h, w)))
    row, col = i * h + r, j * w + c
    valid = (top <= row) & (row < bottom) & (left <= col) & (col < right)
    line, stride = np.clip(row, top, bottom - 1) - top, right - left + 1
    place = first.length + line * stride + np.clip(col, left, right - 1) - left
    newlines = first.length + np.arange(bottom - top) * stride + stride - 1
    return Layout(
        np.concatenate([first.place, place]), np.concatenate([first.valid, valid]), np.concatenate([first.line, line]),
        np.concatenate([first.row, row]), np.concatenate([first.col, col]), np.concatenate([first.crop, 1 + i * wide + j]),
        newlines, first.length + (bottom - top) * stride,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- a batch of prompts
@data
class Pictures:
    """The pictures of a batch of prompts; takes the place of an image array in ``generate`` and ``vlm.forward``.

    Attributes:
      pixels: [B, K, H, W, channels], the crops of all pictures of a prompt, one after the other; zeros behind the last.
      patches: Meta [B, K * P] of their patches: ``pos`` is the place in the prompt; ``valid`` is False for padding; labels
        kind, row, col, crop (counted through the prompt), image (0, 1, ...) and line (see ``newlines``; -1 for none).
      newlines: Meta [B, L] of the newline rows, numbered by the patches' label "line"; None where the model has none.
      text: int32 [B, T], places of the text rows.
      turns: int32 [B, T], their rotary positions, where pictures take fewer than they have rows (M-RoPE; ``patches.rope`` is
        then [B, K * P, 3]), else None.
      inside: Meta [B * K, P'] of what the tower reads, for a tower of pictures of any size (pixels [B, K, P', patch numbers]).
      rows: static; patches of the prompt that has most: what the language model gets of K * P where nothing is dropped.
    """

    pixels: Array
    patches: Meta
    newlines: Meta | None
    text: Array
    turns: Array | None = None
    inside: Meta | None = None
    rows: int = static(0)

    def text_meta(self, meta: Meta) -> Meta:
        """Meta of the text rows at their places."""
        turns = None if self.turns is None else jnp.broadcast_to(self.turns[..., None], (*self.turns.shape, 3))
        return meta.replace(pos=self.text, rope=turns)

    @property
    def crops(self) -> int:
        return self.pixels.shape[1]

    def after(self, lengths) -> Array:
        """int32 [B]: the place behind the last of ``lengths`` [B] text rows, which ends a prompt."""
        return jnp.take_along_axis(self.text, jnp.asarray(lengths)[:, None] - 1, axis=1)[:, 0] + 1


def assemble(pixels, prompts, text, turns=None) -> Pictures:
    """Pictures of a batch.

    Args:
      pixels: per prompt, a list of float arrays [crops, H, W, channels], or [1, patches, numbers].
      prompts: per prompt, a list of (Layout, place of its first row, rotary position of it), one for each of the arrays.
      text: int [B, T], places of the text rows.  turns: int [B, T], their rotary positions, or None.
    """
    every = [layout for placed in prompts for layout, _, _ in placed]
    arrays = [np.asarray(x, np.float32) for mine in pixels for x in mine]
    expect("pixels", len(arrays), f"as many as there are layouts, {len(every)}, at least one", len(arrays) == len(every) > 0)
    shapes = {x.shape[2:] if layout.inside else x.shape[1:] for x, layout in zip(arrays, every, strict=True)}
    expect("pixels", sorted(shapes), "crops of one size", len(shapes) == 1)
    per = max(len(layout.place) // _crops(layout) for layout in every)
    most = max(sum(map(len, mine)) for mine in pixels)
    longest = max(x.shape[1] for x in arrays)
    stacked = np.zeros((len(prompts), most, longest, *arrays[0].shape[2:]), np.float32)
    for i, mine in enumerate(pixels):
        at = 0
        for x in mine:
            stacked[i, at : at + len(x), : x.shape[1]] = x
            at += len(x)
    rows = [_row(mine, placed, per) for mine, placed in zip(pixels, prompts, strict=True)]
    patches = _meta([p for p, _ in rows], most * per, KIND_VISION)
    if turns is not None:
        place = np.stack([_padded(p["turn"], most * per)[:, None] + np.stack([np.zeros(most * per, int), *(
            _padded(p[name], most * per) for name in ("row", "col"))], 1) for p, _ in rows])  # fmt: skip
        patches = patches.replace(rope=place.astype(np.int32))
    lines = max(len(new["pos"]) for _, new in rows)
    newlines = _meta([n for _, n in rows], lines, KIND_NEWLINE) if lines else None
    inside = _inside(prompts, most, longest) if every[0].inside else None
    whole = lambda x: None if x is None else np.asarray(x, np.int32)  # noqa: E731
    return Pictures(stacked, patches, newlines, whole(text), whole(turns), inside, int(patches.valid.sum(1).max()))


def _crops(layout: Layout) -> int:
    return int(layout.crop[-1]) + 1


def _padded(x: np.ndarray, n: int, fill=0) -> np.ndarray:
    return np.concatenate([x, np.full(n - len(x), fill, np.asarray(x).dtype)])


def _row(mine, placed, per: int):
    """(patch fields, newline fields) of one prompt; every crop has ``per`` rows."""
    patches = {name: [np.zeros(0, int)] for name in ("pos", "valid", "line", "row", "col", "crop", "image", "turn")}
    newlines = {name: [np.zeros(0, int)] for name in ("pos", "row", "image")}
    crops = lines = 0
    for number, (x, (layout, start, turn)) in enumerate(zip(mine, placed, strict=True)):
        k = _crops(layout)
        expect("pixels", f"{len(x)} crops", f"{k} as in the picture's layout", len(x) == k)
        n = np.ones(len(layout.place), int)
        fields = dict(pos=start + layout.place, valid=layout.valid.astype(int), row=layout.row, col=layout.col,
                      crop=crops + layout.crop, image=number * n, turn=turn * n,
                      line=np.where(layout.line < 0, -1, layout.line + lines))  # fmt: skip
        for name, value in fields.items():
            patches[name].append(_padded(value, k * per, -1 if name == "line" else 0))
        ends = layout.newlines
        for name, value in dict(pos=start + ends, row=np.arange(len(ends)), image=np.full(len(ends), number)).items():
            newlines[name].append(value)
        crops, lines = crops + k, lines + len(ends)
    return tuple({name: np.concatenate(parts) for name, parts in fields.items()} for fields in (patches, newlines))


def _meta(rows: list[dict], n: int, kind: int) -> Meta:
    def field(name, fill=0):
        return np.stack([_padded(row.get(name, np.ones(len(row["pos"]), int)), n, fill) for row in rows]).astype(np.int32)

    labels = {name: field(name, -1 if name == "line" else 0) for name in ("row", "col", "crop", "image", "line")
              if name in rows[0]}  # fmt: skip
    return Meta(field("pos"), field("valid") > 0, labels={"kind": np.full((len(rows), n), kind, np.int32), **labels})


def _inside(prompts, most: int, n: int) -> Meta:
    """Meta of the patches that the tower reads; prompts with fewer pictures have empty ones behind."""
    rows = []
    for placed in prompts:
        rows += [layout.inside for layout, _, _ in placed]
        rows += [dict(row=np.zeros(0, int), col=np.zeros(0, int), window=np.zeros(0, int))] * (most - len(placed))
    field = lambda name: np.stack([_padded(row[name], n) for row in rows]).astype(np.int32)  # noqa: E731
    labels = {name: field(name) for name in ("row", "col", "window")}
    valid = np.stack([np.arange(n) < len(row["row"]) for row in rows])
    rope = np.stack([labels["row"], labels["col"]], -1)
    pos = np.broadcast_to(np.arange(n, dtype=np.int32), valid.shape)
    return Meta(pos, valid, rope, labels={"kind": np.full(valid.shape, KIND_VISION, np.int32), **labels})


# ------------------------------------------------------------------------------------------------- inside the model
def crops_first(pictures: Pictures) -> Array:
    """[B * K, H, W, channels]: what a tower reads."""
    return pictures.pixels.reshape(-1, *pictures.pixels.shape[2:])


def merge_fact(what: str, found: Array, block: int) -> Array:
    """A fact about the patches [B, ...] as a fact about runs of ``block`` of them: sums of received mass, else means."""
    if what in ("hidden", "keys", "rotated_keys", "values", "head_out"):
        return found.reshape(found.shape[0], -1, block, *found.shape[2:]).mean(2)
    if what in ("received", "value_received", "raw_value_received", "rows", "entropy", "transition"):
        x = found.reshape(*found.shape[:-1], -1, block)
        return x.mean(-1) if what in ("entropy", "transition") else x.sum(-1)
    return found


def fold_tokens(pictures: Pictures, tokens: Tokens) -> Tokens:
    """Rows [B * K, P', C] of the crops as rows [B, K * P', C] of the prompts, with the prompts' Meta."""
    k = pictures.crops
    b, (left, c) = pictures.pixels.shape[0], tokens.x.shape[1:]
    per = pictures.patches.n // k
    full = lambda x: jnp.broadcast_to(x, tokens.x.shape[:2])  # noqa: E731
    crop = jnp.tile(jnp.arange(k, dtype=jnp.int32), b)[:, None]
    original = (full(tokens.meta.pos) + crop * per).reshape(b, k * left)
    mine = gather_meta(pictures.patches, original)
    theirs = {name: full(x).reshape(b, k * left) for name, x in tokens.meta.labels.items() if name not in mine.labels}
    size = None if tokens.meta.size is None else full(tokens.meta.size).reshape(b, k * left)
    meta = mine.replace(valid=mine.valid & full(tokens.meta.valid).reshape(b, k * left), size=size,
                        labels={**theirs, **mine.labels})
    slot = tokens.slot
    if slot is not None:
        slot = jnp.where(slot >= 0, slot + crop * left, -1).reshape(b, -1)
    return Tokens(tokens.x.reshape(b, k * left, c), meta, slot)


def fold_fact(pictures: Pictures, what: str, found: Array) -> Array:
    """A fact about each crop's patches [B * K, ...] as a fact about the prompts' [B, ...]: a column, or a row, per patch; other
    facts are averaged over the crops."""
    k = pictures.crops
    x = found.reshape(-1, k, *found.shape[1:])
    if what in ("hidden", "keys", "rotated_keys", "values", "head_out"):
        return x.reshape(x.shape[0], -1, *x.shape[3:])
    if what in ("received", "value_received", "raw_value_received", "rows", "entropy", "transition"):
        return jnp.moveaxis(x, 1, -2).reshape(x.shape[0], *found.shape[1:-1], -1)
    return x.mean(1)


def one_image(pictures: Pictures, grid: tuple[int, int], patch: int) -> Array:
    """[B, K * H, W, channels]: the crops below each other, whose patches in raster order are the prompts' rows."""
    x = pictures.pixels[:, :, : grid[0] * patch, : grid[1] * patch]
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def in_order(tokens: Tokens, rows: int) -> Tokens:
    """At most ``rows`` rows, in the order of the prompt: padding goes."""
    rows = min(rows, tokens.x.shape[1])
    valid = jnp.broadcast_to(tokens.meta.valid, tokens.x.shape[:2])
    pos = jnp.broadcast_to(tokens.meta.pos, tokens.x.shape[:2])
    order = jnp.argsort(jnp.where(valid, pos, jnp.iinfo(jnp.int32).max), axis=1, stable=True)[:, :rows]
    return reduce_keep(tokens, order, jnp.take_along_axis(valid, order, axis=1))


def newline_rows(pictures: Pictures, row: Array, kept: Meta, rule: str) -> Tokens:
    """The newline rows [B, L, C]: all of them, or ("line") those with a patch left in their line, or none."""
    meta = pictures.newlines
    b, n = meta.pos.shape
    if rule == "none":
        meta = meta.replace(valid=jnp.zeros((b, n), bool))
    elif rule == "line":
        line = jnp.broadcast_to(kept.labels["line"], (b, kept.n))
        line = jnp.where((line < 0) | ~kept.valid, n, line)
        alive = jax.vmap(lambda at: jnp.zeros(n, bool).at[at].set(True, mode="drop"))(line)
        meta = meta.replace(valid=meta.valid & alive)
    return Tokens(jnp.broadcast_to(row, (b, n, row.shape[-1])), meta)


__all__ = ["Layout", "Pictures", "assemble", "best_pinpoint", "live_window", "tiled", "whole"]
