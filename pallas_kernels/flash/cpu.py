"""The fast path on CPU cores: one step is one query tile of one head against its whole list.

Scores of a step stay in a core's cache, and a step whose listed units are all seen whole tests no mask. Keys that lists
read again and again are laid out once per head, end to end; others are read where they lie ([B, M, G, D]). Heads are
walked one after another, so this body is for a device that holds all it computes: alone, or inside a shard_map with a
core per device. The mathematics of a tile pair is ``xla``'s.

A device that owns several cores takes several heads per step instead, for XLA to share out among its threads. Few
queries that read one list for all heads take the heads side by side, too: whole rows of the cache, each read once.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mesh import varying
from pallas_kernels.flash import xla
from pallas_kernels.flash.lists import full_entries

KEYS, TABLE = 2048, 1 << 18  # keys and scores of one softmax; longer lists are merged group by group
ROWS = 128  # query rows that heads of one kv head share a step up to
SCORES = 1 << 18  # of a step on a device with several cores
STEPS = 128  # of a walk from which on a second one without tests is worth its compilation
FEW, BESIDE, SLAB = 16, 8, 1 << 17  # rows of a kv head, heads, and floats of keys that are read side by side
COPY = 2  # times that lists must read a head's keys before laying them out pays
BACKWARD = 512  # keys of a list up to which the gradient, too, goes head by head; beyond, heads together measured faster

# What a step must do about its mask.
WHOLE, TESTED, REPAIRED = 0, 1, 2


def takes(o: dict, opt) -> bool:
    """Whether this body computes the call: everything but tables of queries by keys."""
    return o.get("bias") is None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """``heads``: (kv heads, query heads of each) per step, neighbours all; ``units`` of the keys; ``group``: list entries of
    one softmax; ``beside``: keys of a step's heads stay side by side, [1, 1, 1, c, unit, g * E]."""

    b: int
    g: int
    r: int
    tiles: int
    units: int
    heads: tuple[int, int]
    group: int
    groups: int
    beside: bool

    @property
    def outer(self) -> int:
        """Walks over kv heads, each of ``inner`` steps."""
        return self.b * (self.g // self.heads[0])

    @property
    def inner(self) -> int:
        return self.r // self.heads[1] * self.tiles

    @property
    def copies(self) -> bool:
        return not self.beside and self.inner * self.group * self.groups >= COPY * self.units


def _plan(o: dict, opt) -> _Plan:
    (b, _, h, _), (m, g) = o["q"].shape, o["k"].shape[1:3]
    r, k = h // g, o["index"].shape[3]
    beside = o["index"].shape[1] == 1 and r * opt.tile <= FEW and _divisor(g, BESIDE) > 1
    most = min(KEYS, max(TABLE // opt.tile, opt.unit))
    if beside:
        heads = _divisor(g, BESIDE), r
        most = max(opt.unit, SLAB // (heads[0] * o["k"].shape[3]))
    group = -(-k // -(-k * opt.unit // most))
    if not beside:
        room = max(1, SCORES // (opt.tile * group * opt.unit)) if jax.device_count() == 1 else 1
        shared = o["index"].shape[1] != h or r == 1
        heads_r = r if shared and (r * opt.tile <= ROWS or r <= room) else 1
        heads = _divisor(g, max(room // r, 1)) if heads_r == r else 1, heads_r
    return _Plan(b, g, r, o["index"].shape[2], -(-m // opt.unit), heads, group, -(-k // group), beside)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` up to ``most``."""
    return max(x for x in range(1, most + 1) if n % x == 0)


def _pad(x, axis: int, size: int):
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[a] if a == axis else 0) for a in range(x.ndim)])


# ------------------------------------------------------------------------------------------------------- arrangement


def _rows(p: _Plan, tile: int, x):
    """[B, N, H, E] -> [B, tiles, tile, H, E]; an axis of size 1 would make XLA copy what its loops read."""
    return _pad(x, 1, p.tiles * tile).reshape(p.b, p.tiles, tile, *x.shape[2:])


def _units(p: _Plan, unit: int, x):
    """[B, M, G, E] -> [B * units, unit, G, E]."""
    return _pad(x, 1, p.units * unit).reshape(p.b * p.units, unit, p.g, x.shape[3])


def _facts(o: dict, opt, p: _Plan):
    """All but q, k and v, as ``xla`` arranges it: (rows, keys, per_query, q_ints, k_ints, lists)."""
    bare = {x: o[x][..., :0] for x in "qkv"}
    rows, keys, per_query, q_ints, k_ints, lists = xla._arrange(o | bare, dataclasses.replace(opt, step=p.group))
    k_ints = k_ints | {"valid": lax.optimization_barrier(k_ints["valid"])}  # else XLA fills a constant one anew in every step
    return {"row": rows["row"]}, {x: a for x, a in keys.items() if x not in "kv"}, per_query, q_ints, k_ints, lists


def _kinds(o: dict, opt, p: _Plan):
    """int32 [b, g, r, tiles, groups]: WHOLE where every entry of a group is seen whole, else TESTED, or REPAIRED where
    keys or values are not finite: a hidden one must not reach the result as 0 x NaN."""
    valid = o["k_valid"]
    full = full_entries(o, opt, valid[:, None] if valid.ndim == 2 else valid)
    if p.tiles * o["index"].shape[3] > p.units:
        look = lambda: varying(jnp.isfinite(o["k"]).all() & jnp.isfinite(o["v"]).all(), o)  # noqa: E731
        finite = look() if full is None else lax.cond(full.all(), lambda: varying(jnp.array(True), o), look)
        tested = jnp.where(finite, TESTED, REPAIRED)
    else:  # the steps read less than a look at everything would
        tested = REPAIRED
    if full is None:
        full = jnp.zeros_like(o["index"], bool)
    full = _pad(xla._units(full, p.g, p.r), 4, p.groups * p.group)
    whole = full.reshape(*full.shape[:4], p.groups, p.group).all(-1)
    return jnp.where(whole, WHOLE, tested).astype(jnp.int32)


# -------------------------------------------------------------------------------------------------------------- steps


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a step stands: batch row, first kv head, first query head of each, query tile."""

    p: _Plan
    b: jax.Array
    g: jax.Array
    r: jax.Array
    i: jax.Array

    def of(self, shape) -> tuple:
        """Starts and sizes of a step's part of [1|B, 1|G, 1|r, ...]."""
        starts = tuple(x if n > 1 else 0 for x, n in zip((self.b, self.g, self.r), shape, strict=False))
        return starts, tuple(min(x, n) for x, n in zip((1, *self.p.heads), shape, strict=False))

    def row(self, x):
        """[1|B, 1|G, 1|r, tiles, ...] -> [1, ., ., ...] of this tile."""
        (starts, sizes), rest = self.of(x.shape), x.shape[4:]
        return lax.dynamic_slice(x, (*starts, self.i, *[0] * len(rest)), (*sizes, 1, *rest)).reshape(*sizes, *rest)

    def add_row(self, total, x):
        (starts, sizes), rest = self.of(total.shape), total.shape[4:]
        at = (*starts, self.i, *[0] * len(rest))
        old = lax.dynamic_slice(total, at, (*sizes, 1, *rest))
        return lax.dynamic_update_slice(total, old + x.reshape(old.shape).astype(total.dtype), at)

    def flat(self, shape, index):
        """Entries of ``index`` [1, ., ., c] as rows of an array [1|B, 1|G, 1|r, units, ...] laid end to end."""
        (b, g, r), sizes = self.of(shape)
        along = lambda start, size: start + jnp.arange(size) if size > 1 else jnp.full(1, start)  # noqa: E731
        head = (b * shape[1] + along(g, sizes[1])[:, None]) * shape[2] + along(r, sizes[2])
        return (head * shape[3])[None, ..., None] + index

    def unit(self, x, index):
        """[1|B, 1|G, 1|r, units, ...] -> [1, ., ., c, ...]: the listed units."""
        return x.reshape(-1, *x.shape[4:]).at[self.flat(x.shape, index)].get(mode="promise_in_bounds")

    def add_unit(self, total, index, x):
        flat = self.flat(total.shape, index)
        x = jnp.broadcast_to(x, (*flat.shape, *total.shape[4:]))
        return total.reshape(-1, *total.shape[4:]).at[flat].add(x.astype(total.dtype)).reshape(total.shape)

    def query(self, x):
        """[B, tiles, tile, H, E] -> [1, g, r, tile, E]."""
        sizes = (1, 1, x.shape[2], math.prod(self.p.heads), x.shape[4])
        part = lax.dynamic_slice(x, (self.b, self.i, 0, self.g * self.p.r + self.r, 0), sizes)
        return jnp.moveaxis(part[:, 0], 1, 2).reshape(1, *self.p.heads, x.shape[2], x.shape[4])

    def put_query(self, x, part):
        part = jnp.moveaxis(part.reshape(1, 1, -1, *part.shape[3:]), 2, 3).astype(x.dtype)
        return lax.dynamic_update_slice(x, part, (self.b, self.i, 0, self.g * self.p.r + self.r, 0))

    def _keys(self, index):
        unit, head = jnp.broadcast_arrays(self.b * self.p.units + index, self.g + _along(self.p.heads[0]))
        return jnp.stack([unit, head], -1)

    def reader(self, x):
        """``f(index [1, ., ., c]) -> [1, g, 1|r, c, unit, E]``, or heads side by side, of keys [B * units, unit, G, E]."""
        p, (_, unit, _, e), inside = self.p, x.shape, lax.GatherScatterMode.PROMISE_IN_BOUNDS
        if p.beside:
            sizes = (1, unit, p.heads[0], e)
            one = lambda i: lax.dynamic_slice(x, (self.b * p.units + i, 0, self.g, 0), sizes)  # noqa: E731
            flat = lambda i: one(i).reshape(unit, -1)  # noqa: E731
            slab = lambda index: jnp.concatenate([flat(i) for i in index.ravel()])  # noqa: E731
            return lambda index: lax.optimization_barrier(slab(index)).reshape(*index.shape, unit, -1)
        if p.copies:
            panel = lax.dynamic_slice(x, (self.b * p.units, 0, self.g, 0), (p.units, unit, p.heads[0], e))
            panel = jnp.moveaxis(panel, 2, 0).reshape(-1, unit, e)
            return lambda index: panel.at[_along(p.heads[0]) * p.units + index].get(mode=inside)
        numbers = lax.GatherDimensionNumbers((4, 5), (0, 2), (0, 2))
        return lambda index: lax.gather(x, self._keys(index), numbers, (1, unit, 1, e), mode=inside)

    def add_key(self, total, index, x):
        numbers = lax.ScatterDimensionNumbers((4, 5), (0, 2), (0, 2))
        x, mode = x.astype(total.dtype), lax.GatherScatterMode.PROMISE_IN_BOUNDS
        return lax.scatter_add(total, self._keys(index), x, numbers, mode=mode)


def _along(heads: int):
    """Numbers of a step's kv heads, beside an index [1, ., ., c]."""
    return jnp.arange(heads, dtype=jnp.int32)[None, :, None, None]


def _walk(p: _Plan, step, init, k, v):
    """``step(place, key reader, value reader, totals)`` everywhere: what shares keys follows each other."""
    of_g = p.g // p.heads[0]

    def loop(size: int, body, carry):
        return lax.fori_loop(0, size, body, carry) if size > 1 else body(0, carry)

    def heads(number, totals):
        b, g = number // of_g, number % of_g * p.heads[0]
        readers = [_Place(p, b, g, 0, 0).reader(x) for x in (k, v)]

        def one(number, totals):
            return step(_Place(p, b, g, number // p.tiles * p.heads[1], number % p.tiles), *readers, totals)

        return loop(p.inner, one, totals)

    return loop(p.outer, heads, init)


def _untested(p: _Plan, opt, kinds, walk):
    """``walk(kinds)``, or ``walk(None)`` where all steps turn out to be whole: a switch in every step makes products of
    several cores a tenth slower, and keeps a single row from reading keys where they lie. Lists under a mask nearly always
    have a step to test; long ones see to it group by group (``_loop``)."""
    single = math.prod(p.heads) * opt.tile == 1
    if opt.mask is not None or p.groups > 1 or not single and p.outer * p.inner < STEPS:
        return walk(kinds)
    return lax.cond((kinds == WHOLE).all(), lambda: walk(None), lambda: walk(kinds))


def _read(at: _Place, j, q, k, v, facts, opt):
    """What group ``j`` of a step reads, as ``xla._step_inputs`` gives it, and the list's units; the integers as a function,
    because most steps need none."""
    rows, keys, per_query, q_ints, k_ints, lists = facts
    p = at.p
    chunk = lambda x: lax.dynamic_slice_in_dim(x, j * p.group, p.group, 3)  # noqa: E731
    index = chunk(at.row(lists["index"]))
    real, index = index < p.units, jnp.minimum(index, p.units - 1)
    diff = {"q": q, "k": k(index), "row": jax.tree.map(at.row, rows["row"])}
    diff |= jax.tree.map(lambda x: at.unit(x, index), keys)
    if "log_weight" in per_query:
        diff["log_weight"] = chunk(at.row(per_query["log_weight"]))

    def ints():
        live = real & (j * p.group + jnp.arange(p.group) < at.row(lists["count"])[..., None])
        found = {
            "q": {x: at.row(a)[..., :, None] for x, a in q_ints.items()},
            "k": {x: xla._merge_units(at.unit(a, index))[..., None, :] for x, a in k_ints["fields"].items()},
            "valid": at.unit(k_ints["valid"], index),
            "live": live,
        }
        return found | ({"bounds": chunk(at.row(lists["bounds"]))} if "bounds" in lists else {})

    return diff, v(index), ints, index


def _by_kind(at: _Place, kinds, j, f, diff, v, ints, opt):
    """``f(diff, v, ints, ok)`` with ``ok`` None where nothing needs a test; ``kinds`` None: nowhere."""

    def whole(diff, v):
        return f(diff, v, {} if opt.score_mod is None else ints(), None)

    if kinds is None:
        return whole(diff, v)
    kind = lax.dynamic_index_in_dim(at.row(kinds), j, 3, keepdims=False).max()  # the most careful of the heads

    def tested(diff, v):
        found = ints()
        return f(diff, v, found, xla._visible(found, opt))

    def repaired(diff, v):
        diff, v, found = xla.finite(diff, v, ints())
        return f(diff, v, found, xla._visible(found, opt))

    return lax.switch(kind, (whole, tested, repaired), diff, v)


def _loop(at: _Place, kinds, lists, body, carry):
    """Run ``body(kinds, j, carry)`` over the groups of a step, stopping at the largest count: without a test as far as all
    of them are whole, which in most long lists are all but the last."""
    if at.p.groups == 1:
        return body(kinds, 0, carry)
    most = (at.row(lists["count"]).max() + at.p.group - 1) // at.p.group
    tested = (at.row(kinds) != WHOLE).any((0, 1, 2))
    first = jnp.minimum(jnp.where(tested.any(), tested.argmax(), at.p.groups), most).astype(most.dtype)
    carry = lax.fori_loop(0, first, functools.partial(body, None), carry)
    return lax.fori_loop(first, most, functools.partial(body, kinds), carry)


# ------------------------------------------------------------------------------------------------------------ forward


def _forward(o: dict, opt):
    p, (b, n, h, _), dv = _plan(o, opt), o["q"].shape, o["v"].shape[3]
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    q, k, v = _rows(p, opt.tile, o["q"]), _units(p, opt.unit, o["k"]), _units(p, opt.unit, o["v"])
    facts, kinds = _facts(o, opt, p), _kinds(o, opt, p)

    def step(kinds, at, k, v, outputs):
        query = at.query(q)

        def body(kinds, j, carry):
            diff, values, ints, _ = _read(at, j, query, k, v, facts, opt)

            def add(diff, values, ints, ok):
                return xla.accumulate(carry, xla._logits(diff, ints, opt, acc), ok, xla._merge_units(values), opt, acc)

            return _by_kind(at, kinds, j, add, diff, values, ints, opt)

        carry = None if p.groups == 1 else varying(xla.nothing((1, *p.heads, opt.tile), dv, acc), o)
        out, lse = xla.finish(_loop(at, kinds, facts[-1], body, carry), opt)
        return at.put_query(outputs[0], out), at.put_query(outputs[1], lse[..., None])

    shape = (p.b, p.tiles, opt.tile, h)
    init = varying((jnp.zeros((*shape, dv), o["v"].dtype), jnp.zeros((*shape, 1), acc)), o)
    walk = lambda kinds: _walk(p, functools.partial(step, kinds), init, k, v)  # noqa: E731
    out, lse = _untested(p, opt, kinds, walk)
    return out.reshape(b, -1, h, dv)[:, :n], lse.reshape(b, -1, h)[:, :n]


# ----------------------------------------------------------------------------------------------------------- backward


def _backward(o: dict, opt, out, lse, d_out, d_lse):
    """(dq, dk, dv in the operands' layout, gradients of the facts as ``xla.push_floats`` takes them)."""
    p, (b, n, h, d), (m, g) = _plan(o, opt), o["q"].shape, o["k"].shape[1:3]
    acc = jnp.promote_types(o["q"].dtype, jnp.float32)
    q, k, v = _rows(p, opt.tile, o["q"]), _units(p, opt.unit, o["k"]), _units(p, opt.unit, o["v"])
    facts, kinds = _facts(o, opt, p), _kinds(o, opt, p)
    rows, keys, per_query = facts[:3]
    delta = jnp.sum(d_out.astype(acc) * out.astype(acc), -1) - d_lse
    lse = jnp.where(lse > -jnp.inf, lse, 0.0)  # of rows that see nothing, whose keys are all hidden below
    cotangents = {"do": _rows(p, opt.tile, d_out)}
    cotangents |= {x: _rows(p, opt.tile, a[..., None]) for x, a in (("delta", delta), ("lse", lse))}
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, acc))

    def step(kinds, at, k, v, totals):
        query = at.query(q)
        row = {x: at.query(a) for x, a in cotangents.items()}
        row |= {x: row[x][..., 0] for x in ("delta", "lse")}

        def body(kinds, j, carry):
            dq, d_rows, d_keys, d_tables, dk, dv = carry
            diff, values, ints, index = _read(at, j, query, k, v, facts, opt)

            def pair(diff, values, ints, ok):
                s, pull = jax.vjp(lambda x: xla._logits(x, ints, opt, acc), diff)
                ds, d_values = xla.pair(row, s, ok, values, opt, acc)
                (grads,) = pull(ds.astype(s.dtype))
                return grads, d_values

            grads, d_values = _by_kind(at, kinds, j, pair, diff, values, ints, opt)
            d_rows = jax.tree.map(at.add_row, d_rows, {"row": grads["row"]})
            d_keys = {x: jax.tree.map(lambda t, e: at.add_unit(t, index, e), d_keys[x], grads[x]) for x in d_keys}
            if "log_weight" in d_tables:
                d_tables = {"log_weight": _add_entries(at, d_tables["log_weight"], j, grads["log_weight"])}
            dk, dv = at.add_key(dk, index, grads["k"]), at.add_key(dv, index, d_values)
            return dq + grads["q"].astype(acc), d_rows, d_keys, d_tables, dk, dv

        dq, *rest = _loop(at, kinds, facts[-1], body, (varying(jnp.zeros(query.shape, acc), o), *totals[1:]))
        return at.put_query(totals[0], dq), *rest

    init = varying((jnp.zeros_like(q), zeros(rows), zeros(keys), zeros(per_query), *zeros((k, v))), o)
    walk = lambda kinds: _walk(p, functools.partial(step, kinds), init, k, v)  # noqa: E731
    dq, d_rows, d_keys, d_tables, dk, dv = _untested(p, opt, kinds, walk)
    dq = dq.reshape(b, -1, h, d)[:, :n]
    dk, dv = (x.reshape(b, -1, g, x.shape[3])[:, :m] for x in (dk, dv))
    return (dq, dk, dv), (d_rows, d_keys, d_tables)


def _add_entries(at: _Place, total, j, x):
    """Add to group ``j`` of a step's entries in a table [1|B, 1|G, 1|r, tiles, K]."""
    whole = jnp.zeros((*x.shape[:3], total.shape[4]), total.dtype)
    return at.add_row(total, lax.dynamic_update_slice_in_dim(whole, x.astype(total.dtype), j * at.p.group, 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flash(floats: dict, ints: dict, opt):
    return _forward(floats | ints, opt)


def _fwd(floats, ints, opt):
    out, lse = _forward(floats | ints, opt)
    return (out, lse), (floats, ints, out, lse)


def _bwd(opt, saved, cotangents):
    floats, ints, out, lse = saved
    o = floats | ints
    if o["index"].shape[3] * opt.unit > BACKWARD or _plan(o, opt).beside:
        return xla.push_floats(floats, ints, opt, xla._backward(o, opt, out, lse, *cotangents)), None
    found, (rows, keys, tables) = _backward(o, opt, out, lse, *cotangents)
    bare = {x: floats[x][..., :0] for x in "qkv"}
    arrange = dataclasses.replace(opt, step=_plan(o, opt).group)
    shapes = jax.eval_shape(lambda f: xla._arrange(f | ints, arrange)[:2], floats | bare)
    q, k, v = (jnp.zeros(side[x].shape, side[x].dtype) for x, side in zip("qkv", shapes[:1] + shapes[1:] * 2, strict=True))
    grads = xla.push_floats(floats | bare, ints, arrange, (rows | {"q": q}, keys | {"k": k, "v": v}, tables))
    return grads | {x: a.astype(floats[x].dtype) for x, a in zip("qkv", found, strict=True)}, None


_flash.defvjp(_fwd, _bwd)


def flash(o: dict, opt):
    return _flash(*xla.divide(o), opt)
