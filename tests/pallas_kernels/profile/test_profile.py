import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from jaxattn.core import mask as masks
from pallas_kernels import _compat, _mesh
from pallas_kernels import profile as op
from pallas_kernels.flash.xla import divide
from pallas_kernels.profile import gpu, reference, tpu, xla
from tests.pallas_kernels.flash.calls import CALLS, Slopes, call

RACES = pltpu.InterpretParams(detect_races=True)
BODIES = {
    "xla": (xla.profile, xla.reduce, xla.diagonals),
    "tpu": tuple(functools.partial(f, interpret=RACES) for f in (tpu.profile, tpu.reduce, tpu.diagonals)),
    "gpu": tuple(functools.partial(f, interpret=True) for f in (gpu.profile, gpu.reduce, gpu.diagonals)),
}
LENGTHS = {"xla": ("17", "1000"), "tpu": ("17", "129"), "gpu": ("one row", "127", "129")}


def close(x, y, tol=1e-5):
    x, y = (np.nan_to_num(np.asarray(a, np.float32), neginf=-9.0) for a in (x, y))
    np.testing.assert_allclose(x, y, rtol=0, atol=tol * max(np.abs(y).max(), 1e-3))


@pytest.mark.parametrize(("body", "length"), [(body, length) for body in BODIES for length in LENGTHS[body]])
def test_sums_are_the_references(rng, body, length):
    """Both passes from queries and keys alone, and one pass from a mass that holds other keys too."""
    o, opt = call(rng, **next(x for name, x in CALLS.items() if name.startswith(length)))
    weights = jnp.asarray(rng.normal(size=o["q"].shape[:3]), jnp.float32)
    profile, reduce, _ = BODIES[body]

    def run(profile, reduce):
        columns, lse = profile(o | {"weights": weights}, opt)
        return columns, lse, reduce(o | reference.known(lse + 0.3, weights), opt)

    got, want = (jax.jit(lambda f=f: run(*f))() for f in ((profile, reduce), (reference.profile, reference.reduce)))
    jax.tree.map(close, got, want)
    assert body != "tpu" or not interpreter.races.races_found


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_gradients_of_the_kernels_are_the_references(rng, name):
    """Of columns, expected logits and the log mass, in queries, keys, side rows, biases, weights and a given lse."""
    o, opt = call(rng, n=9, m=20, h=4, g=2, tile=8, unit=8, mask=masks.causal(), score_mod=Slopes(), key_bias=2)
    floats, ints = divide(o)
    floats = {x: a for x, a in floats.items() if x != "v"}
    a, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 4, 20), (1, 9, 4)))

    def loss(profile, reduce, floats, weights):
        columns, lse = profile(floats | ints | {"weights": weights}, opt)
        own, logits = reduce(floats | ints | reference.known(lse + 0.3, weights), opt)
        return jnp.sum(a * columns**2) + jnp.where(lse > -jnp.inf, lse, 0.0).sum() + jnp.sum(a * own) + jnp.sum(logits**2)

    bodies = BODIES[name] if name == "gpu" else (BODIES[name][0], xla.reduce)  # interpreting takes a while there
    fast, slow = (functools.partial(loss, *f[:2]) for f in (bodies, (reference.profile, reference.reduce)))
    got, want = (jax.jit(jax.grad(f, (0, 1)))(floats, weights) for f in (fast, slow))
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("name", BODIES)
def test_diagonals_are_the_references(rng, name):
    """Rows in several groups, several tiles of keys, a head size and a number of heads that are padded."""
    r, m, dtype = (9, 700, jnp.bfloat16) if name == "tpu" else (37, 1100, jnp.float32)
    q, k = (jnp.asarray(rng.normal(size=(1, n, h, 20)), dtype) for n, h in ((r, 3), (m, 1)))
    lse = jnp.asarray(rng.normal(size=(1, r, 3)), jnp.float32) + 6
    for o in ({"q": q, "k": k}, *([] if name == "tpu" else [{"q": q, "k": k, "lse": lse}])):
        got, want = (jax.jit(functools.partial(f, scale=0.3))(o) for f in (BODIES[name][2], reference.diagonals))
        jax.tree.map(close, got, want)


def test_gradient_of_diagonals_on_a_kernel(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, n, h, 8)), jnp.float32) for n, h in ((5, 2), (20, 1)))
    a, b = (jnp.asarray(rng.normal(size=(1, 2, 20)), jnp.float32) for _ in range(2))

    def loss(f, q, k):
        vertical, slash = f({"q": q, "k": k}, 0.3)
        return jnp.sum(a * vertical) + jnp.sum(b * slash**2)

    got, want = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1)))(q, k) for f in (BODIES["gpu"][2], reference.diagonals))
    jax.tree.map(close, got, want)


def test_a_call_cut_over_a_mesh_has_the_same_sums(rng):
    """Over batch and heads; columns are sums over all queries, which stay together."""
    mesh = _compat.make_mesh((2, 2, 2), ("data", "sequence", "tensor"))
    o, opt = call(rng, n=16, b=2, h=4, g=2, hs=2, tile=8, unit=8, mask=masks.causal(), key_bias=2)
    o = {x: a for x, a in o.items() if x != "v"} | {"weights": jnp.asarray(rng.normal(size=(2, 16, 4)), jnp.float32)}
    cut = _mesh.spread(xla.profile, op.dims(o, opt), mesh=mesh)
    jax.tree.map(close, jax.jit(lambda o: cut(o, opt))(o), reference.profile(o, opt))


def test_a_unit_that_is_listed_twice_counts_once(rng):
    """And units too small for a kernel are read together."""
    o, opt = call(rng, n=6, m=15, tile=3, unit=3, k=3)
    twice = o | {"index": jnp.concatenate([o["index"], o["index"][..., ::-1]], -1), "count": o["count"] * 0 + 6}
    o = o | {"count": o["count"] * 0 + 3}
    weights = jnp.ones((1, 6, 1))
    want = reference.profile(o | {"weights": weights}, opt)
    jax.tree.map(close, jax.jit(lambda o: op.profile(o, opt, weights))(twice), want)
    jax.tree.map(close, jax.jit(lambda o: BODIES["gpu"][0](o | {"weights": weights}, opt))(o), want)


def test_a_named_body_says_what_it_does_not_support(rng):
    o, opt = call(rng, n=16, tile=8, unit=8)
    weights = jnp.ones((1, 16, 1))
    with pytest.raises(ValueError, match="'tpu' does not support q of float16"):
        op.profile(o | {"q": o["q"].astype(jnp.float16)}, opt, weights, "tpu")
    with pytest.raises(ValueError, match="'gpu' does not support log_weight"):
        op.reduce(o | {"log_weight": jnp.zeros((1, 1, 2, 2))}, opt, weights, weights, "gpu")
    with pytest.raises(ValueError, match="'tpu' does not support 600 last rows"):
        op.diagonals(jnp.zeros((1, 600, 1, 8)), jnp.zeros((1, 600, 1, 8)), implementation="tpu")
    with pytest.raises(ValueError, match="implementation: expected None or one of"):
        op.profile(o, opt, weights, "cuda")
