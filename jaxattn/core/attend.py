"""``attend``: the one attention of the library, and the monoid of its partial results.

A Call says what is attended (own keys and cached Views), under which mask, Selection, biases and gains; the answer is a
Part. Everything that several key sets share (sinks, class gains, gates) happens once, after their Parts are merged, so
a prompt split over caches, branches or devices has the value and the gradient of the undivided one.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.core.mask import block_map
from jaxattn.core.types import Array, Call, Meta, Part, Selection, View, contract, expect
from pallas_kernels import _tuned
from pallas_kernels import gather as lists
from pallas_kernels.flash import Options, flash, walks
from pallas_kernels.profile import column_sums

TILE, UNIT = 256, 512  # query rows and key rows per step of the dense path, where a chip's own are not known
FEW, MANY = 16, 1024  # query rows that decode together, and listed keys from which on fetching them all at once pays
SEEN = 1e-18  # of a row's mass: less than this left by weighted keys is none (its square still divides)
FINE = 128  # of both, where a mask known at trace time then leaves a good deal less to compute


def attend(q, k, v, *, where=None, mask=None, q_meta=None, k_meta=None, bias=None, scale=None, score_mod=None,
           normalizer="softmax", sink_logit=None, out_gate=None, row=None, key=None, implementation=None) -> Part:
    """Attention of queries to keys.

    Args:
      q: [B, N, H, D].  k: [B, M, G, D] with H % G == 0.  v: [B, M, G, Dv].
      where: Selection of key units per query tile, or None (every unit the mask can see).
      mask: expression of ``jaxattn.masks`` or None.  q_meta, k_meta: Meta; default positions 0..N-1 aligned at the end
        (the last query sits at the last key) when N <= M, else at the start.
      bias: [B|1, H|1, N|1, M] added to the logits.  scale: multiplies q.k, default D ** -0.5.
      score_mod, normalizer, sink_logit, out_gate, row, key: see ``Call``.
      implementation: None (best that works) | "reference" | "xla" | "tpu" | "gpu".
    Returns: Part(out [B, N, H, Dv], lse [B, N, H]).
    """  # fmt: skip
    call = make_call(q, k, v, where=where, mask=mask, q_meta=q_meta, k_meta=k_meta, bias=bias, scale=scale,
                     score_mod=score_mod, normalizer=normalizer, sink_logit=sink_logit, out_gate=out_gate,
                     row=row or {}, key=key or {})  # fmt: skip
    return attend_call(call, implementation=implementation)[0]


def make_call(q, k, v, *, q_meta=None, k_meta=None, **rest) -> Call:
    """A checked Call. Default Metas are numpy, so their block maps are known at trace time."""
    check_qkv(q, k, v)
    n, m = q.shape[1], k.shape[1]
    k_meta = Meta.of(m) if k_meta is None else k_meta
    if q_meta is None:
        q_meta = Meta.of(n, pos=np.arange(n, dtype=np.int32)[None] + max(m - n, 0))
    for name, meta, rows in (("q_meta", q_meta, n), ("k_meta", k_meta, m)):
        expect(name, f"{meta.n} rows", f"{rows} rows, as many as the array it describes", meta.n == rows)
    return Call(q, k, v, q_meta, k_meta, **rest)


def check_qkv(q, k, v) -> None:
    """The shape rules of every attention, as errors that name the argument."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(name, f"shape {x.shape}", "[batch, tokens, heads, head_dim]", x.ndim == 4)
        expect(name, x.dtype, "a floating dtype", jnp.issubdtype(x.dtype, jnp.floating))
    expect("k", f"batch {k.shape[0]}", f"the queries' batch, {q.shape[0]}", k.shape[0] == q.shape[0])
    expect("v", f"{v.shape[:3]}", f"batch, tokens and heads of k, {k.shape[:3]}", v.shape[:3] == k.shape[:3])
    expect("k", f"head_dim {k.shape[3]}", f"head_dim of q, {q.shape[3]}", k.shape[3] == q.shape[3])
    expect("q", f"{q.shape[2]} heads", f"a multiple of the {k.shape[2]} kv heads", q.shape[2] % k.shape[2] == 0)


def attend_call(call: Call, *, stats: tuple[str, ...] = (), implementation: str | None = None) -> tuple[Part, dict]:
    """Attend own keys and every past View, merged; see ``attend``.

    ``stats``: "masses" adds {"masses": [B, N, H, C]} of the classes of ``call.gain``; "received" adds {"received":
    [B, H, M]}, the probability that each own key got from the valid rows together, before gains, by a second pass over
    the same lists (``statistics.received`` weighs rows, and answers for Views too).
    """
    check_qkv(call.q, call.k, call.v)
    check_call(call)
    known = {"masses", "received"}
    expect("stats", tuple(stats), f"some of {sorted(known)}", set(stats) <= known)
    expect("stats", "'received'", "none without a softmax", "received" not in stats or call.normalizer == "softmax")
    found = {}
    if call.gain is None:
        part = _union(call, implementation)
        out, lse = part.out, part.lse
    else:
        masses, lse = class_masses(call, implementation)
        gains = call.gain(masses, call.gain_args)
        out = _union(tilt(call, gains), implementation).out
        # The second softmax normalises sum_c gain_c mass_c to 1.
        out = (out * jnp.sum(gains * masses, -1)[..., None]).astype(call.v.dtype)
        if "masses" in stats:
            found["masses"] = masses
    if call.normalizer == "l1":
        total = out[..., -1:]
        out, lse = out[..., :-1] / jnp.where(total == 0, 1.0, total), None
    elif call.normalizer == "none":
        lse = None
    if call.sink_logit is not None:
        out, lse = _absorb(out, lse, call.sink_logit)
    if call.out_gate is not None:
        out = (out * call.out_gate).astype(out.dtype)
    if "received" in stats:
        found["received"] = _received(call, lse, implementation)
    return Part(out, lse), found


def _received(call: Call, lse, implementation: str | None) -> Array:
    """[B, H, M]: sum over the valid rows of the own keys' probabilities, of the mass ``lse`` [B, N, H]."""
    rows = jnp.asarray(call.q_meta.valid)[..., None]
    for view in call.past:
        rows = rows if view.own is None else rows & view.own
    weights = jnp.broadcast_to(rows, lse.shape).astype(lse.dtype)
    return column_sums(*lower(call), lse, weights, implementation)


def _union(call: Call, implementation: str | None) -> Part:
    """One softmax over the own keys and those of every View."""
    part = attend_keys(call, implementation) if call.k_meta.weight is None else _weighed(call, implementation)
    for view in call.past:
        if view.own is not None:
            part = hide(part, view.own)
    return merge(part, *(attend_view(call, view, implementation) for view in call.past))


def _weighed(call: Call, implementation: str | None) -> Part:
    """The own keys' Part where ``k_meta.weight`` w says how much each counts for the others, p_ij ~ (w_j + (1 - w_j) [i = j])
    e_ij: plain attention to the values w_j (v_j, 1), whose last column is the mass that is left, and each row's own key."""
    n, m, h = call.q.shape[1], call.k.shape[1], call.q.shape[2]
    expect("k_meta.weight", f"{n} queries of {m} keys", "as many, the same rows", n == m)
    plain = call.bias is None and call.score_mod is None and "bias" not in call.key and call.normalizer == "softmax"
    expect("k_meta.weight", "bias, score_mod or another normalizer", "a plain softmax beside it", plain)
    acc = jnp.promote_types(call.v.dtype, jnp.float32)
    w = jnp.broadcast_to(_per_key(call.k_meta.weight).astype(acc), call.k.shape[:3])[..., None]
    meta, v = call.k_meta.replace(weight=None), call.v.astype(acc)
    part = attend_keys(call.replace(v=jnp.concatenate([w * v, w], -1), k_meta=meta), implementation)
    k, v, w = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (call.k, v, w))
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    own = jnp.einsum("bnhd,bnhd->bnh", call.q, k, preferred_element_type=acc) * scale
    if meta.size is not None:
        own = own + _per_key(jnp.log(jnp.maximum(meta.size, 1e-9)))
    seen = jnp.isfinite(part.lse) & _per_key(jnp.asarray(meta.valid))
    own = jnp.where(seen, jnp.exp(jnp.where(seen, own - jnp.where(seen, part.lse, 0.0), 0.0)), 0.0)[..., None] * (1 - w)
    mass = part.out[..., -1:] + own
    some = mass > SEEN
    out = jnp.where(some, (part.out[..., :-1] + own * v) / jnp.where(some, mass, 1.0), 0.0)
    lse = jnp.where(some[..., 0], part.lse + jnp.log(jnp.where(some, mass, 1.0))[..., 0], -jnp.inf)
    return Part(out.astype(call.v.dtype), lse)


def class_masses(call: Call, implementation: str | None = None) -> tuple[Array, Array]:
    """(masses, at least float32, [B, N, H, C]; lse [B, N, H]) of the classes of ``call.gain``: one pass whose values
    are C columns, so that neither a map nor a copy of the values per class exists."""
    classes = call.gain.groups
    dtype = jnp.promote_types(call.v.dtype, jnp.float32)

    def columns(v, key):
        group = key.get("group")
        expect("key['group']", None if group is None else group.shape, "int32 [B|1, M, 1|G]", group is not None)
        return jnp.broadcast_to((group[..., None] == jnp.arange(classes)).astype(dtype), (*v.shape[:3], classes))

    past = tuple(view.replace(v=columns(view.v, view.key)) for view in call.past)
    plain = call.replace(v=columns(call.v, call.key), past=past, gain=None, gain_args={})
    part = _union(plain.map_keys(_ungrouped), implementation)
    return part.out.astype(dtype), part.lse


def _ungrouped(meta, key):
    return {name: x for name, x in key.items() if name != "group"}


@contract
class _Tilt:
    """Adds log gain_c of the row to the logits of class c."""

    classes: int
    inner: object = None

    def fields(self):
        return frozenset() if self.inner is None else self.inner.fields()

    def __call__(self, logits, q, k, row, key):
        if self.inner is not None:
            logits = self.inner(logits, q, k, row, key)
        for c in range(self.classes):
            logits = logits + jnp.where(key["class"] == c, row[f"log_gain.{c}"], 0.0)
        return logits


def tilt(call: Call, gains: Array) -> Call:
    """The Call whose probabilities are p_j gain_c(j) / sum: gains [B, N, H, C], at least 0, become logits."""
    expect("gain", call.score_mod, "a score_mod that is not a gain already", not isinstance(call.score_mod, _Tilt))
    log = jnp.where(gains > 0, jnp.log(jnp.maximum(gains, 1e-30)), -1e9)  # no trace of a class without gain
    row = call.row | {f"log_gain.{c}": log[..., c] for c in range(call.gain.groups)}

    def classed(meta, key):
        return _ungrouped(meta, key) | {"class": key["group"].astype(log.dtype)}

    call = call.map_keys(classed)
    return call.replace(row=row, score_mod=_Tilt(call.gain.groups, call.score_mod), gain=None, gain_args={})


def check_call(call: Call) -> None:
    expect("normalizer", call.normalizer, "'softmax', 'l1' or 'none'", call.normalizer in ("softmax", "l1", "none"))
    if call.normalizer != "softmax":
        expect("normalizer", call.normalizer, "'softmax' beside bias, sink_logit, gain or token sizes",
               call.bias is None and call.sink_logit is None and call.gain is None and "bias" not in call.key)  # fmt: skip
    if call.bias is not None:
        n, m, h = call.q.shape[1], call.k.shape[1], call.q.shape[2]
        shape = tuple(call.bias.shape)
        b = call.q.shape[0]
        ok = len(shape) == 4 and shape[0] in (1, b) and shape[1] in (1, h) and shape[2] in (1, n) and shape[3] == m
        expect("bias", f"shape {shape}", f"[1|{b}, 1|{h}, 1|{n}, {m}]", ok)


def _absorb(out, lse, sink_logit):
    """Put a logit's mass, which carries no value, into the normaliser."""
    sink = jnp.broadcast_to(sink_logit, lse.shape).astype(lse.dtype)
    total = jnp.logaddexp(jnp.where(jnp.isfinite(lse), lse, -jnp.inf), sink)
    keep = jnp.where(jnp.isfinite(lse), jnp.exp(jnp.where(jnp.isfinite(lse), lse, 0.0) - total), 0.0)
    return (out * keep[..., None]).astype(out.dtype), total


def hide(part: Part, seen: Array) -> Part:
    """The Part with rows where ``seen`` (bool, broadcastable to [B, N, H]) is False emptied."""
    seen = jnp.broadcast_to(seen, part.out.shape[:-1])
    lse = None if part.lse is None else jnp.where(seen, part.lse, -jnp.inf)
    return Part(jnp.where(seen[..., None], part.out, 0), lse)


# --------------------------------------------------------------------------------------------------- one set of keys


def attend_keys(call: Call, implementation: str | None = None) -> Part:
    """The Part of the own keys alone, before merging, sinks, gains and gates."""
    out, lse = attend_lowered(*lower(call, turned=True), call.where is not None, implementation)
    return Part(out, None if call.normalizer != "softmax" else lse)


def attend_lowered(operands: dict, options: Options, listed: bool, implementation: str | None = None):
    """(out, lse) of lowered operands: a list for each query, and a long one for few queries, go to ``gather``, the rest to
    ``flash``."""
    n, rows = operands["q"].shape[1], operands["index"].shape[2]
    plain = options.score_mod is None and options.normalizer == "softmax" and "bias" not in operands
    known = implementation is None or implementation in lists.IMPLEMENTATIONS
    many = operands["index"].shape[3] * options.unit >= MANY
    if "pos" in operands:
        expect("where.pos", "score_mod, another normalizer or a table of biases", "a plain softmax beside it", plain)
        operands = operands | {x: _by_query(operands[x], n, options.tile) for x in PER_LIST if x in operands}
    else:
        few = rows == 1 and n <= FEW and many
        fetched = listed and plain and known and (rows == n > 1 or few)
        if not fetched or rows == 1 and implementation in (None, "xla") and walks(operands, options):
            return flash(operands, options, implementation)
    static = lists.Options(options.mask, options.scale, options.unit, distinct=options.distinct, **operands.get("rope", {}))
    operands = {x: a for x, a in operands.items() if x not in ("row", "key", "rope")}
    return lists.gather(operands, static, implementation)[:2]


PER_LIST = ("index", "count", "bounds", "log_weight", "pos")


def _by_query(x, n: int, tile: int):
    """A table [b, Hs, Nq, ...] of query tiles as one list for all of few queries, or one per query."""
    return x if x.shape[2] == 1 and n <= FEW else jnp.repeat(x, tile, axis=2)[:, :, :n]


def view_call(call: Call, view: View) -> Call:
    """The Call that attends a View instead of the own keys, over the query heads the view covers."""
    q, row, args = call.q, call.row, call.gain_args
    if view.heads is not None:
        g = call.k.shape[2]
        q = take_heads(q, view.heads, g)
        row = {k: take_heads(x, view.heads, g) for k, x in row.items()}
    return call.replace(q=q, k=view.k, v=view.v, k_meta=view.meta, key=view.key, where=view.where, bias=None, row=row,
                        gain_args=args, past=())  # fmt: skip


def attend_view(call: Call, view: View, implementation: str | None = None) -> Part:
    """The Part of one View, over all query heads (rows of heads it does not cover are empty)."""
    part = attend_keys(view_call(call, view), implementation)
    if view.heads is None:
        return part
    return Part(put_heads(part.out, view.heads, call, 0), put_heads(part.lse, view.heads, call, -jnp.inf))


def take_heads(x, heads, g: int):
    """x [B, N, H|1, ...] -> the query heads of kv heads ``heads`` [G']."""
    if x.ndim < 3 or x.shape[2] == 1:
        return x
    grouped = x.reshape(*x.shape[:2], g, x.shape[2] // g, *x.shape[3:])
    return grouped[:, :, heads].reshape(*x.shape[:2], -1, *x.shape[3:])


def put_heads(x, heads, call: Call, fill):
    if x is None:
        return None
    g, h = call.k.shape[2], call.q.shape[2]
    x = x.reshape(*x.shape[:2], heads.shape[0], h // g, *x.shape[3:])
    full = jnp.full((*x.shape[:2], g, *x.shape[3:]), fill, x.dtype).at[:, :, heads].set(x)
    return full.reshape(*full.shape[:2], h, *full.shape[4:])


def lower(call: Call, *, turned: bool = False) -> tuple[dict, Options]:
    """A Call's own keys as the kernel's operands and static options. turned: for ``attend_lowered``, which alone moves keys
    to the positions that a Selection gives them."""
    q, k, v = call.q, call.k, call.v
    n, m, h = q.shape[1], k.shape[1], q.shape[2]
    for name, a in call.key.items():
        g = k.shape[2]
        ok = a.ndim == 3 and a.shape[0] in (1, q.shape[0]) and a.shape[1] == m and a.shape[2] in (1, g, h)
        expect(f"key[{name!r}]", f"shape {a.shape}", f"[B|1, {m}, 1|{g}|{h}]", ok)
    for name, a in call.row.items():
        ok = a.ndim == 3 and a.shape[0] in (1, q.shape[0]) and a.shape[1] in (1, n) and a.shape[2] in (1, h)
        expect(f"row[{name!r}]", f"shape {a.shape}", f"[B|1, 1|{n}, 1|{h}]", ok)
    key = dict(call.key)
    key.pop("group", None)
    key_bias = key.pop("bias", None)
    bias = call.bias
    if bias is not None and bias.shape[2] == 1:  # constant over the queries: a row vector, not a table
        extra = jnp.moveaxis(bias[:, :, 0], 1, 2)
        key_bias, bias = extra if key_bias is None else key_bias + extra, None
    if call.k_meta.size is not None:
        size = _per_key(jnp.log(jnp.maximum(call.k_meta.size, 1e-9)))
        key_bias = size if key_bias is None else key_bias + size
    if call.normalizer == "l1":
        v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], -1)
    names = call.mask.fields() if call.mask is not None else frozenset()
    if call.score_mod is not None:
        names = names | call.score_mod.fields()
    where = call.where
    if where is None:
        held = _tuned.sizes("flash", "xla", _tuned.width(q.shape[3], v.shape[3]), q.dtype, {"tile": TILE, "unit": UNIT})
        where = dense_list(call.mask, call.q_meta, call.k_meta, n, m, held["tile"], held["unit"])
    check_selection(where, call)
    operands = {
        "q": q, "k": k, "v": v, "bias": bias, "key_bias": key_bias,
        "index": jnp.asarray(where.index), "count": jnp.asarray(where.count), "bounds": where.bounds,
        "log_weight": where.log_weight, "k_valid": jnp.asarray(call.k_meta.valid),
        "q_fields": {x: jnp.asarray(_field(call.q_meta, x)) for x in names},
        "k_fields": {x: jnp.asarray(_field(call.k_meta, x)) for x in names},
        "row": {x: jnp.broadcast_to(a, (a.shape[0], n, a.shape[2])) for x, a in call.row.items()}, "key": key,
    }  # fmt: skip
    expect("where.pos", "positions", "none here: only attention itself turns keys", turned or where.pos is None)
    operands |= _turns(call, where)
    step = max(1, min(where.index.shape[-1], 128 // where.unit))  # small units are read together
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    normalizer = "softmax" if call.normalizer == "softmax" else "none"
    options = Options(call.mask, call.score_mod, normalizer, scale, where.unit, where.tile, step, where.distinct)
    return {name: x for name, x in operands.items() if x is not None}, options


def _turns(call: Call, where: Selection) -> dict:
    """What moves the keys of retrieved units, which are rotated already, to the positions their selection gives them."""
    if where.pos is None:
        return {}
    expect("where.pos", "no call.rope", "the layer's Rope, which says how keys turn", call.rope is not None)
    held = call.k_meta.pos if call.k_meta.rope is None else call.k_meta.rope
    one = call.rope.axes is None and held.ndim == call.k_meta.pos.ndim
    expect("where.pos", "keys with several position axes", "a Rope over one position", one)
    freqs = jnp.asarray(call.rope.frequencies())
    return {"pos": where.pos, "k_rope": -jnp.asarray(held), "freqs": freqs, "rope": {"rope_layout": call.rope.layout}}


def _field(meta: Meta, name: str):
    from jaxattn.core.mask import field_of

    return field_of(meta, name)


def _per_key(x):
    """A Meta field [B|1, M] or [B, G, M] as side rows [B|1, M, 1|G]."""
    return x[..., None] if x.ndim == 2 else jnp.moveaxis(x, 1, 2)


def dense_list(mask, q_meta: Meta, k_meta: Meta, n: int, m: int, tile: int = TILE, unit: int = UNIT) -> Selection:
    """Lists of the key tiles each query tile may see: known at trace time where both Metas are."""
    tile, unit = min(n, tile), min(m, unit)
    if tile == n and unit == m:
        return Selection(np.zeros((1, 1, 1, 1), np.int32), np.ones((1, 1, 1), np.int32), unit, tile, distinct=True)
    may, _ = block_map(mask, q_meta, k_meta, tile, unit)
    if isinstance(may, np.ndarray):
        may = may.any((0, 1), keepdims=True)
        if tile >= FINE and unit > FINE:
            fine = block_map(mask, q_meta, k_meta, FINE, FINE)[0].any((0, 1), keepdims=True)
            if fine.sum() * FINE * FINE < 0.8 * may.sum() * tile * unit:
                may, tile, unit = fine, FINE, FINE
        count = may.sum(-1).astype(np.int32)
        cap = max(1, int(count.max()))
        index = np.argsort(~may, axis=-1, kind="stable")[..., :cap].astype(np.int32)
        index = np.where(np.arange(cap) < count[..., None], index, 0).astype(np.int32)
        return Selection(index, count, unit, tile, distinct=True)
    may = jnp.any(may, (0, 1), keepdims=True)
    may = jnp.broadcast_to(may, (1, 1, -(-n // tile), -(-m // unit)))
    index = jnp.argsort(~may, axis=-1, stable=True).astype(jnp.int32)
    return Selection(index, may.sum(-1).astype(jnp.int32), unit, tile, distinct=True)


def check_selection(where: Selection, call: Call) -> None:
    (b, n, h, _), g = call.q.shape, call.k.shape[2]
    shape = where.index.shape
    expect("where.index", f"shape {shape}", "[B|1, Hs, Nq, K]", len(shape) == 4)
    expect("where.index", f"batch {shape[0]}", f"1 or {b}", shape[0] in (1, b))
    expect("where.index", f"{shape[1]} heads", f"1, {g} (kv heads) or {h} (query heads)", shape[1] in (1, g, h))
    tiles = -(-n // where.tile)
    expect("where.index", f"{shape[2]} query tiles", f"{tiles} tiles of {where.tile} rows for {n} rows", shape[2] == tiles)
    expect("where.count", f"shape {where.count.shape}", f"{shape[:3]}", tuple(where.count.shape) == tuple(shape[:3]))


# ------------------------------------------------------------------------------------------------------------- merge


def merge(*parts: Part, log_weight=None, gain=None) -> Part:
    """One softmax over the union of the parts' keys: a commutative monoid under log-sum-exp.

    Args:
      log_weight: per part, broadcastable to [B, N, H]; added inside the normaliser.
      gain: per part, multiplied on its share outside the normaliser.
    Parts without lse are unnormalised and simply add.
    """
    expect("parts", "none", "at least one Part", len(parts) > 0)
    if len(parts) == 1 and log_weight is None and gain is None:
        return parts[0]
    if all(p.lse is None for p in parts):
        gains = [1.0] * len(parts) if gain is None else gain
        return Part(sum(p.out * g for p, g in zip(parts, gains, strict=True)), None)
    expect("parts", "some without lse", "all with lse, or all without", all(p.lse is not None for p in parts))
    lse = jnp.stack([p.lse for p in parts])
    if log_weight is not None:
        lse = lse + jnp.stack([jnp.broadcast_to(w, lse.shape[1:]) for w in log_weight])
    seen = lse > -jnp.inf
    # Rows that no part sees would give exp(-inf - -inf); both the value and the gradient stay 0 here.
    top = jnp.max(jnp.where(seen, lse, -jnp.inf), 0)
    safe_top = jnp.where(jnp.isfinite(top), top, 0.0)
    mass = jnp.where(seen, jnp.exp(jnp.where(seen, lse, 0.0) - safe_top), 0.0)
    total = mass.sum(0)
    some = total > 0
    share = mass / jnp.where(some, total, 1.0)
    if gain is not None:
        share = share * jnp.stack([jnp.broadcast_to(g, share.shape[1:]) for g in gain])
    out = sum(p.out.astype(share.dtype) * s[..., None] for p, s in zip(parts, share, strict=True))
    total_lse = jnp.where(some, safe_top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    return Part(out.astype(parts[0].out.dtype), total_lse)


def mix(parts, weights) -> Array:
    """Branches without a common softmax: sum of weights[i] * parts[i].out; weights broadcast to [B, N, H]."""
    return sum(p.out * jnp.asarray(w)[..., None] for p, w in zip(parts, weights, strict=True)).astype(parts[0].out.dtype)
