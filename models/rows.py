"""The rows of a stack: named groups in one array, with what is known about each row and where original rows went."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.core.types import Array, Meta, Tokens, data, static


@data
class Streams:
    """The rows of a stack: named groups lie one after the other in x; positions in Meta say what order means.

    x [B, N, C]; meta fields [B, N]; slots {group: int32 [B, N0]} follow original rows; groups ((name, rows), ...)."""

    x: Array
    meta: Meta
    slots: dict[str, Array]
    groups: tuple = static(())

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
        for name in ("size", "weight"):
            if getattr(new.meta, name) is not None and getattr(old, name) is None:
                old = old.replace(**{name: jnp.ones(old.pos.shape, jnp.float32)})
        if new.meta.rope is not None and old.rope is None:
            old = old.replace(rope=old.pos)
        more = {label: jnp.zeros_like(old.pos) for label in new.meta.labels if label not in old.labels}
        old = old.replace(labels={**old.labels, **more})
        meta = jax.tree.map(join, old, jax.tree.map(jnp.asarray, new.meta))
        return Streams(join(self.x, new.x), meta, {**self.slots, name: new.slot}, groups)


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
