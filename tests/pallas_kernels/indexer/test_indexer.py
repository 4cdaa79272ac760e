import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn.core import mask as masks
from pallas_kernels import _compat, _mesh
from pallas_kernels import indexer as op
from pallas_kernels.indexer import body as shared
from pallas_kernels.indexer import gpu, reference, tpu, xla
from tests.jaxprs import largest
from tests.pallas_kernels.indexer.calls import CALLS, call

RACES = pltpu.InterpretParams(detect_races=True)
KERNELS = {
    "tpu": functools.partial(tpu.select, interpret=RACES),
    "gpu": functools.partial(gpu.select, interpret=True),
}
LENGTHS = {"tpu": ("129", "1000"), "gpu": ("one query", "17", "129", "1000")}


def numbered(length):
    return next(x for name, x in CALLS.items() if name.startswith(length))


def equal(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", CALLS)
def test_chunks_merge_to_the_full_tables_choice(rng, monkeypatch, name):
    """Every index, with many equal scores: several chunks, and several tiles of queries."""
    monkeypatch.setattr(xla, "CHUNK", 40)
    monkeypatch.setattr(xla, "SCORES", 2000)
    o, opt = call(rng, **CALLS[name])
    index, count, values = jax.jit(lambda o: op.select(o, opt))(o)
    equal((index, count, values), reference.select(o, opt))
    used = np.arange(index.shape[-1]) < np.asarray(count)[..., None]
    assert (np.diff(np.where(used, index, 2000 + np.arange(used.shape[-1]))) > 0).all()
    assert (np.asarray(index)[~used] == 0).all() and np.isneginf(np.asarray(values)[~used]).all()


@pytest.mark.parametrize(("body", "length"), [(body, x) for body in KERNELS for x in LENGTHS[body]])
def test_kernels_choose_what_the_reference_chooses(rng, monkeypatch, body, length):
    monkeypatch.setattr(shared, "PART", 7)  # of GPU's 10 and 17 queries: two and three parts
    o, opt = call(rng, **numbered(length))
    equal(jax.jit(lambda o: KERNELS[body](o, opt))(o), reference.select(o, opt))
    assert body != "tpu" or not interpreter.races.races_found


def test_candidates_in_rising_order_overflow_the_buffer(rng):
    """The worst case of a running threshold: every score is a new largest one."""
    o, opt = call(rng, n=1, units=400, k=16, d=1)
    o |= {"k": jnp.arange(400.0).reshape(1, 400, 1, 1), "q": jnp.ones((1, 1, 1, 1)), "q_valid": jnp.ones((1, 1), bool)}
    index, count, values = jax.jit(lambda o: KERNELS["gpu"](o, opt))(o)
    assert index[0, 0, 0].tolist() == list(range(384, 400)) and int(count[0, 0, 0]) == 16
    np.testing.assert_array_equal(values[0, 0, 0], 0.5 * np.arange(384, 400))


@pytest.mark.parametrize("heads", ["each", "sum", "max"])
def test_gradients_of_the_chosen_scores(rng, monkeypatch, heads):
    monkeypatch.setattr(xla, "GATHERED", 500)  # several tiles of queries
    kw = dict(n=9, units=30, k=6, b=2, h=4, g=2, heads=heads, gate="relu", weight=True, mask=masks.causal())
    o, opt = call(rng, **kw)
    floats, ints = xla.divide(o)
    # A ReLU at 0 and equal heads have no one derivative: real numbers.
    floats = {x: jnp.asarray(rng.normal(size=a.shape), jnp.float32) for x, a in floats.items()}

    def loss(select, floats):
        values = select(floats | ints, opt)[2]
        weight = jnp.cos(jnp.arange(values.size)).reshape(values.shape)
        return jnp.sum(jnp.where(values > -jnp.inf, values, 0.0) ** 2 * weight)

    got, want = (jax.jit(jax.grad(functools.partial(loss, f)))(floats) for f in (xla.select, reference.select))
    for x in want:
        np.testing.assert_allclose(got[x], want[x], atol=1e-5 * float(jnp.abs(want[x]).max()))


def test_a_mapped_kernel_is_a_longer_batch(rng):
    o, opt = call(rng, n=3, units=20, k=4, mask=masks.causal())
    scales = jnp.array([1.0, -1.0])
    run = lambda f, s: f(o | {"q": o["q"] * s}, opt)  # noqa: E731
    got = jax.jit(jax.vmap(functools.partial(run, KERNELS["gpu"])))(scales)
    for i, s in enumerate(scales):
        equal([x[i] for x in got], run(reference.select, s))


def test_a_call_cut_over_a_mesh_chooses_the_same(rng):
    """Batch, queries and lists; never units, nor the query heads of one list."""
    mesh = _compat.make_mesh((2, 2, 2), ("data", "sequence", "tensor"))
    o, opt = call(rng, n=6, units=20, k=4, b=2, h=4, g=2, heads="sum", weight=True, mask=masks.causal())
    cut = _mesh.spread(xla.select, op.dims(o, opt), mesh=mesh)
    equal(jax.jit(lambda o: cut(o, opt))(o), reference.select(o, opt))
    shared = op.dims(o | {"k": o["k"][:, :, :1]}, opt)
    assert shared.operands["q"] == ("batch", "length", None, None) and shared.outputs[1] == ("batch", None, "length")


def test_nan_and_what_is_hidden_are_not_chosen(rng):
    o, opt = call(rng, n=5, units=12, k=12, padded=2, mask=masks.causal())
    o["k"] = o["k"].at[0, 3].set(jnp.nan).at[0, 11].set(jnp.inf)
    o["k_valid"] = o["k_valid"].at[:, 11].set(False)
    for f in (xla.select, KERNELS["gpu"]):
        index, count, values = jax.jit(lambda o, f=f: f(o, opt))(o)
        used = np.arange(12) < np.asarray(count)[..., None]
        assert not np.isin(np.asarray(index)[used], [3, 11]).any() and np.isfinite(np.asarray(values)[used]).all()
    assert int(count[0, 0, 2]) == 0  # a query that is padding


def test_no_table_of_scores():
    n, units = 512, 1 << 18
    shape = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    o = {"q": shape(jnp.float32, 1, n, 1, 8), "k": shape(jnp.float32, 1, units, 1, 8)}
    o |= {"q_valid": shape(jnp.bool_, 1, n), "k_valid": shape(jnp.bool_, 1, units)}
    run = lambda o: op.select(o, op.Options(64))[2].sum()  # noqa: E731
    size, primitive, where = largest(run, o)
    assert size < n * units // 16, f"{primitive} makes {where}"


def test_top_k_of_rows_on_many_devices_stays_there(rng):
    mesh = _compat.make_mesh((8,), ("data",))
    x = jnp.asarray(rng.integers(0, 9, size=(8, 3, 40)), jnp.float32)
    cut = jax.device_put(x, NamedSharding(mesh, P("data")))
    want = jax.lax.top_k(x, 5)
    run = jax.jit(lambda x: op.top_k(x, 5))
    assert "all-gather" not in run.lower(cut).compile().as_text()
    got = run(cut)
    equal(got, want)
    assert got[0].sharding.spec[0] == got[1].sharding.spec[0] == "data"
    equal(jax.vmap(run)(x), want)
    gradient = lambda f: jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(f(x, 5)[0] ** 3))))  # noqa: E731
    np.testing.assert_array_equal(gradient(op.top_k)(x), gradient(jax.lax.top_k)(x))


@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        ({"weight": jnp.ones((1, 4, 2))}, {}, r"weight: expected the shape \(1, 4, 1\)"),
        ({"k": jnp.ones((1, 9, 1, 5))}, {}, r"k: expected \[B, units, kv heads, D\]"),
        ({"k_valid": jnp.ones((1, 8), bool)}, {}, "k_valid: expected bool"),
        ({}, {"heads": "mean"}, "heads: expected one of"),
        ({}, {"gate": "gelu"}, "gate: expected one of"),
        ({}, {"k": 0}, "k: expected at least 1"),
    ],
)
def test_bad_input_is_named(rng, operands, options, message):
    o, opt = call(rng, n=4, units=9, k=3)
    with pytest.raises(ValueError, match=message):
        op.select(o | operands, dataclasses.replace(opt, **options))


def test_a_named_body_says_what_it_does_not_support(rng):
    o, opt = call(rng, n=4, units=9, k=3)
    half = {x: o[x].astype(jnp.float16) for x in ("q", "k")}
    with pytest.raises(ValueError, match="'gpu' does not support q of float16"):
        op.select(o | half, opt, "gpu")
    long = {"k": jnp.zeros((1, 5000, 1, 8)), "k_valid": jnp.ones((1, 5000), bool)}
    with pytest.raises(ValueError, match="'tpu' does not support 4500 units per list"):
        op.select(o | long, dataclasses.replace(opt, k=4500), "tpu")
