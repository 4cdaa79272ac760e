"""The rows of a stack: named groups in one array, with what is known about each row and where original rows went."""

from __future__ import annotations

from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.select import gather_meta, gather_tokens
from jaxattn.core.slots import merge_tokens
from jaxattn.core.types import Array, Meta, Tokens, data, static


@data
class Streams:
    """The rows of a stack: named groups lie one after the other in x; positions in Meta say what order means.

    x [B, N, C]; meta fields [B, N]; slots {group: int32 [B, N0]} follow original rows; groups ((name, rows), ...); origins
    {group: Meta of the original rows [B|1, N0]} of groups that were reduced."""

    x: Array
    meta: Meta
    slots: dict[str, Array]
    groups: tuple = static(())
    origins: dict[str, Meta] = field(default_factory=dict)

    def span(self, name: str) -> tuple[int, int]:
        start = 0
        for group, rows in self.groups:
            if group == name:
                return start, start + rows
            start += rows
        raise ValueError(f"acts_on: expected one of {[g for g, _ in self.groups]}, got {name!r}")

    def spans(self) -> dict[str, tuple[int, int]]:
        return {name: self.span(name) for name, _ in self.groups}

    def tokens(self, name: str) -> Tokens:
        start, stop = self.span(name)
        meta = jax.tree.map(lambda a: a[:, start:stop], self.meta)
        return Tokens(self.x[:, start:stop], meta, self.slots[name])

    def put(self, name: str, new: Tokens) -> Streams:
        start, stop = self.span(name)
        join = lambda a, b: jnp.concatenate([a[:, :start], b.astype(a.dtype), a[:, stop:]], 1)  # noqa: E731
        groups = tuple((g, new.x.shape[1] if g == name else n) for g, n in self.groups)
        old = self.meta
        for part in ("size", "weight"):
            if getattr(new.meta, part) is not None and getattr(old, part) is None:
                old = old.replace(**{part: jnp.ones(old.pos.shape, jnp.float32)})
        if new.meta.rope is not None and old.rope is None:
            old = old.replace(rope=old.pos)
        more = {label: jnp.zeros_like(old.pos) for label in new.meta.labels if label not in old.labels}
        old = old.replace(labels={**old.labels, **more})
        meta = jax.tree.map(join, old, jax.tree.map(jnp.asarray, new.meta))
        origins = self.origins if name in self.origins else {**self.origins, name: self.tokens(name).meta}
        return Streams(join(self.x, new.x), meta, {**self.slots, name: new.slot}, groups, origins)

    def places(self) -> Places:
        """The places of all original rows, in the groups' order."""
        b, index, metas, groups, start = self.x.shape[0], [], [], [], 0
        for name, n in self.groups:
            slot = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
            origin = self.origins.get(name)
            slot = slot if origin is None else self.slots[name]
            row = jnp.where(slot >= 0, start + slot, 0)
            meta = gather_meta(self.meta, row)
            meta = meta.replace(valid=meta.valid & (slot >= 0), size=None)
            if origin is not None:
                full = lambda x, shape=slot.shape: jnp.broadcast_to(x, (*shape, *jnp.shape(x)[2:]))  # noqa: E731
                labels = {x: full(origin.labels[x]) if x in origin.labels else a for x, a in meta.labels.items()}
                turned = origin.pos if origin.rope is None else origin.rope
                meta = meta.replace(pos=full(origin.pos), valid=meta.valid & origin.valid, labels=labels,
                                    rope=None if meta.rope is None else full(turned).astype(meta.rope.dtype))  # fmt: skip
            index.append(jnp.where(meta.valid, row, -1))
            metas.append(meta)
            groups.append((name, slot.shape[1]))
            start += n
        meta = jax.tree.map(lambda *a: jnp.concatenate(a, 1), *metas)
        return Places(jnp.concatenate(index, 1), meta, tuple(groups))


@data
class Places:
    """Places in a sequence and the row that stands for each: row int32 [B, P] (-1: none), meta [B, P]."""

    row: Array
    meta: Meta
    groups: tuple = static(())

    spans = Streams.spans
    span = Streams.span

    def spread(self, x: Array) -> Array:
        """[B, N, ...] of the rows -> [B, P, ...] of their places."""
        return gather_tokens(x, jnp.maximum(self.row, 0))

    def average(self, x: Array, rows: int) -> Array:
        """[B, P, ...] of the places -> [B, rows, ...], the mean over a row's places."""
        return merge_tokens(x.reshape(*x.shape[:2], -1), self.row, rows, mode="mean").reshape(x.shape[0], rows, *x.shape[2:])


def streams_of(groups: dict[str, tuple[Array, Meta]]) -> Streams:
    """Streams from {name: (x, Meta)}; labels missing in one group are 0 there."""
    names = sorted({label for _, meta in groups.values() for label in meta.labels})
    has = {f: any(getattr(m, f) is not None for _, m in groups.values()) for f in ("rope", "size", "weight")}
    metas, slots = [], {}
    for name, (x, meta) in groups.items():
        shape = x.shape[:2]
        full = lambda a, shape=shape: jnp.broadcast_to(a, (*shape, *jnp.shape(a)[2:]))  # noqa: E731
        labels = {n: full(meta.labels.get(n, np.zeros((1, shape[1]), np.int32))) for n in names}
        rope = (full(meta.pos if meta.rope is None else meta.rope)) if has["rope"] else None
        size = (full(np.ones((1, shape[1]), np.float32) if meta.size is None else meta.size)) if has["size"] else None
        weight = (full(np.ones((1, shape[1]), np.float32) if meta.weight is None else meta.weight)) if has["weight"] else None
        metas.append(Meta(full(meta.pos), full(meta.valid), rope, size, labels, weight))
        slots[name] = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    x = jnp.concatenate([x for x, _ in groups.values()], 1)
    meta = jax.tree.map(lambda *a: jnp.concatenate(a, 1), *metas)
    return Streams(x, meta, slots, tuple((name, x.shape[1]) for name, (x, _) in groups.items()))
