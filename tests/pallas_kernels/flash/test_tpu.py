import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxattn.core import mask as masks
from pallas_kernels import flash as op
from pallas_kernels.flash import layout, tpu
from tests.pallas_kernels.flash.calls import CALLS, Slopes, call, compare


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_references(rng, name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    kwargs = CALLS[name]
    o, opt = call(rng, **kwargs)
    tol = 2e-2 if kwargs.get("dtype") == jnp.bfloat16 else 1e-5
    params = pltpu.InterpretParams(detect_races=True)
    compare(lambda o, opt: tpu.flash(o, opt, interpret=params), o, opt, tol)
    assert not interpreter.races.races_found


def test_scores_without_a_softmax(rng):
    o, opt = call(rng, n=20, d=8, tile=8, unit=8, normalizer="none", mask=masks.causal())
    out, lse = jax.jit(lambda o: tpu.flash(o, opt, interpret=pltpu.InterpretParams()))(o)
    want, _ = op.flash(o, opt, "reference")
    assert jnp.abs(out - want).max() < 1e-5 * jnp.abs(want).max()
    assert not lse.any()


def test_a_mapped_call_is_a_longer_batch(rng):
    o, opt = call(rng, n=16, h=2, g=1, tile=8, unit=8, mask=masks.causal(), key_bias=1)

    def gradient(body, scale):
        def loss(q, k):
            out, lse = body(o | {"q": q * scale, "k": k})
            return (out * jnp.arange(out.size).reshape(out.shape)).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

        return jax.grad(loss, (0, 1))(o["q"], o["k"])

    scales = jnp.array([1.0, 0.5, 2.0])
    body = lambda o: tpu.flash(o, opt, interpret=pltpu.InterpretParams())  # noqa: E731
    got = jax.jit(jax.vmap(lambda x: gradient(body, x)))(scales)
    want = jax.vmap(lambda x: gradient(lambda o: op.flash(o, opt, "reference"), x))(scales)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()))


def test_transposed_lists_hold_every_entry_once(rng):
    o, opt = call(rng, n=50, m=64, h=2, tile=4, unit=8, hs=2, k=5)
    p = tpu._plan(o, opt)
    chunks, offsets = layout.transpose_lists(p, layout.arrange_ints(p, o, opt)["lists"])
    for head in range(2):
        flat = chunks[0, head, :, 0].reshape(-1)
        for unit in range(p.units):
            listed = [t for t in range(p.tiles) if unit in o["index"][0, head, t, : int(o["count"][0, head, t])].tolist()]
            assert flat[offsets[0, head, 0, 0, unit] : offsets[0, head, 0, 0, unit + 1]].tolist() == listed


class Sorted(Slopes):
    def __call__(self, logits, q, k, row, key):
        return jnp.sort(logits, -1)


class Table:
    def test(self, q, k):
        return (q["pos"] > jnp.asarray(np.arange(3))) & (q["pos"] // 2 == k["pos"])


@pytest.mark.parametrize(
    "operands, options, why",
    [
        ({"q": jnp.zeros((1, 16, 1, 8), jnp.float16)}, {}, "q of float16"),
        ({"bias": jnp.zeros((1, 1, 16, 16))}, {"unit": 4}, "bias that differs by query with units of 4 keys"),
        ({}, {"unit": 2048}, "units of 2048 keys"),
        ({}, {"score_mod": Sorted()}, "score_mod with .*sort"),
        ({}, {"mask": Table()}, "mask with .*sign, .*captured array"),
    ],
)
def test_a_named_body_says_what_it_does_not_support(rng, operands, options, why):
    o, opt = call(rng, n=16, tile=8, unit=8, mask=masks.causal())
    with pytest.raises(ValueError, match=f"'tpu' does not support {why}"):
        op.flash(o | operands, dataclasses.replace(opt, **options), "tpu")
    out, _ = op.flash(o, opt)  # the choice that is not named works wherever XLA does
    assert jnp.isfinite(out).all()


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: the extra tpu-aot is not installed"
)


def report(*arguments) -> dict:
    arguments = ["tpu", "--ops", "flash", "--chips", "v5e", "--json", *arguments]
    command = [sys.executable, "-m", "benchmarks.kernel_report", *arguments]
    # A second process may hold the compiler; nothing runs on a chip here.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["kernel"]: row for row in json.loads(done.stdout.splitlines()[-1])}


@needs_compiler
def test_a_call_cut_over_four_chips_compiles():
    """Each device gets a quarter: half of the queries, half of the heads."""
    found = report("--tokens", "4096", "--entries", "8", "--mesh", "--layouts", "given")
    assert set(found) == {"flash_forward", "flash_query_gradient", "flash_key_gradient"}
    assert found["flash_forward"]["HBM out"] == 2048 * 16 * (128 * 2 + 4)  # out in bfloat16, lse in float32


@needs_compiler
def test_128k_tokens_compile_for_a_tpu():
    """Lists per query head, forward and backward, of 128K tokens and 32 heads: 2 MiB of indices, twice the scalar memory.
    Where the compiler may choose layouts, q, k and v are not copied."""
    found = report("--lists", "query heads", "--entries", "16", "--layouts", "free")
    assert set(found) == {"flash_forward", "flash_query_gradient", "flash_key_gradient"}
    for row in found.values():
        assert 0 < row["VMEM"] < 48 * 2**20
        assert 0 < row["SMEM"] < 2**17
        assert row["temp, layouts free"] < row["results"] / 10
