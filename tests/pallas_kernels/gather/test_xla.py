import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import mask as masks
from pallas_kernels import gather as op
from pallas_kernels.gather import body, lists, reference, xla
from tests.pallas_kernels.gather.calls import CALLS, call, check_hidden, compare


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_references(rng, name):
    o, opt = call(rng, **CALLS[name])
    compare(xla.gather, o, opt, 2e-2 if CALLS[name].get("dtype") == jnp.bfloat16 else 1e-5)


def test_parts_of_rows_and_steps_of_entries_change_nothing(rng, monkeypatch):
    """Lists read 4 entries at a time, and rows 3 at a time, the last part reaching back and the last step being part empty."""
    monkeypatch.setattr(xla, "KEYS", 4)
    monkeypatch.setattr(xla, "FETCHED", 3 * 2 * 2 * 4 * 16)
    monkeypatch.setattr(xla, "CUT", (32, 16))
    o, opt = call(rng, n=10, m=30, b=2, h=4, g=2, hs=2, own=True, k=7, key_bias=2, log_weight=True, sums="kv", pos=True,
                  rope="half")  # fmt: skip
    assert xla._rows_at_once(o, opt, lists.shape_of(o, opt)) == 3
    compare(xla.gather, o, opt, 1e-5)
    compare(xla.gather, *call(rng, n=2, m=64, h=2, g=1, rope="half", key_bias=1), 1e-5)


ONE_HEAD = {
    "lists, biases and sums of kv heads": dict(
        b=2, h=4, g=2, hs=2, key_bias=2, log_weight=True, sums="kv", pos=True, rope="half"
    ),
    "of query heads": dict(b=2, h=4, g=2, hs=4, key_bias=4, log_weight=True, sums="heads", mask=masks.causal()),
    "shared, keys of a pool": dict(b=2, h=4, g=2, pool=True, valid=False, bounds=True, unit=2),
    "a bias of all heads": dict(h=2, g=2, key_bias=1),
}


@pytest.mark.parametrize("name", ONE_HEAD)
def test_heads_one_by_one_change_nothing(rng, monkeypatch, name):
    """Many lists are computed a kv head and a few queries at a time; the last part reaches back over rows that are done."""
    monkeypatch.setattr(body, "ALONE", 1)
    alone = xla.BODY._replace(by_head=True, rows_at_once=lambda o, opt, s: 4)
    o, opt = call(rng, n=10, m=30, own=True, k=5, **ONE_HEAD[name])
    compare(lambda o, opt: body.run(alone, o, opt), o, opt, 1e-5)


def test_lists_in_use_decide_and_nothing_else(rng):
    """Entries behind the count, indices outside the keys and empty lists read nothing."""
    o, opt = call(rng, n=2, m=40, b=2, h=4, g=2, unit=8, hs=2, k=4, valid=False, count=3)
    want = op.gather(o | {"count": jnp.full_like(o["count"], 2)}, opt)
    for lost in (-1, 5, 2**30, o["index"][..., 0]):  # the last: a unit that is listed already
        got = op.gather(o | {"index": o["index"].at[..., 2].set(lost)}, opt)
        np.testing.assert_allclose(got[0], want[0], atol=1e-6)
        np.testing.assert_allclose(got[1], want[1], atol=1e-6)
    for empty in (o | {"count": jnp.zeros_like(o["count"])}, o | {"index": o["index"][..., :0]}):
        (out, lse, _), pull = jax.vjp(lambda k, v: op.gather(empty | {"k": k, "v": v}, opt), o["k"], o["v"])  # noqa: B023
        assert not out.any() and (lse == -jnp.inf).all()
        assert not any(x.any() for x in pull((jnp.ones_like(out), jnp.ones_like(lse), None)))


def test_invalid_slots_may_hold_anything(rng):
    o, opt = call(rng, n=2, m=40, b=2, h=4, g=2, unit=8, hs=2, k=4)
    valid = jnp.arange(40)[None] % 3 > 0
    wild = o | {x: jnp.where(valid[..., None, None], o[x], jnp.nan) for x in ("k", "v")} | {"k_valid": valid}

    def gradient(o):
        f = lambda q, k, v: xla.gather(o | {"q": q, "k": k, "v": v}, opt)[0].sum()  # noqa: E731
        return jax.value_and_grad(f, (0, 1, 2))(o["q"], o["k"], o["v"])

    for a, b in zip(jax.tree.leaves(gradient(wild)), jax.tree.leaves(gradient(o | {"k_valid": valid})), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sums_per_key_are_the_columns_of_the_map(rng):
    o, opt = call(rng, n=3, m=48, b=2, h=4, g=2, unit=8, hs=2, k=4, sums="heads")
    weights = jnp.asarray(rng.random((2, 3)), jnp.float32)
    _, _, sums = xla.gather(o, opt)
    got = op.received(sums, o["index"], o["count"], opt.unit, 48, weights)
    eye = o | {"v": jnp.broadcast_to(jnp.eye(48)[None, :, None], (2, 48, 2, 48))}
    p = reference.gather(eye, opt)[0]  # values that name their key: the output is the map
    np.testing.assert_allclose(got, jnp.einsum("bnhm,bn->bhm", p, weights), atol=1e-5)
    full = {x: a for x, a in o.items() if x not in ("index", "count")}
    _, _, sums = xla.gather(full, dataclasses.replace(opt, sums="kv"))
    np.testing.assert_allclose(op.received(sums, None, None, 8, 48).sum(-1), 6.0, rtol=1e-5)  # 3 queries of 2 heads


@pytest.mark.parametrize("lists", [True, False])
def test_what_is_hidden_may_hold_anything(rng, lists):
    check_hidden(rng, xla.gather, lists)


def test_every_key_is_the_list_of_all_units(rng):
    o, opt = call(rng, n=2, m=96, h=4, g=2, unit=8, k=12, count=12, key_bias=2)
    o["index"] = jnp.arange(12, dtype=jnp.int32).reshape(1, 1, 1, 12)
    full = {x: a for x, a in o.items() if x not in ("index", "count")}
    for a, b in zip(xla.gather(o, opt)[:2], xla.gather(full, opt)[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "change, options, why",
    [
        ({"index": jnp.zeros((1, 3, 1, 2), jnp.int32)}, {}, r"index: expected \[1\|2, 1\|2\|4, 1\|2, K\]"),
        ({"count": None}, {}, "count: expected one beside index, got none"),
        ({"k": jnp.zeros((3, 40, 2, 8))}, {}, "k: expected batch 1 or 2"),
        ({"pos": jnp.zeros((2, 2, 1, 4), jnp.int32)}, {}, "freqs: expected frequencies beside k_rope or pos"),
        ({"k_valid": jnp.zeros((2, 39), bool)}, {}, "k_valid: expected"),
        ({}, {"sums": "all"}, "sums: expected None, 'kv' or 'heads', got 'all'"),
    ],
)
def test_bad_operands_are_named(rng, change, options, why):
    o, opt = call(rng, n=2, m=40, b=2, h=4, g=2, unit=8, hs=2, k=4)
    with pytest.raises(ValueError, match=why):
        op.gather(o | change, dataclasses.replace(opt, **options))
