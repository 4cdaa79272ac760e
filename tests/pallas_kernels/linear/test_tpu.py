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

from pallas_kernels import linear as op
from pallas_kernels.linear import tpu
from tests.pallas_kernels.linear.calls import CALLS, call, check, compare, results


def kernels(o, opt):
    return tpu.linear(o, opt, interpret=pltpu.InterpretParams())


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_references(name):
    check(kernels, name)


def test_no_races(rng):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    o, opt = call(rng, n=130, h=4, k_heads=2, f=8, decay="token", chunk=128)
    compare(lambda o, opt: tpu.linear(o, opt, interpret=pltpu.InterpretParams(detect_races=True)), o, opt, 1e-5)
    assert not interpreter.races.races_found


def test_two_halves_are_the_whole(rng):
    """The state hands over values and gradients where no chunk ends."""
    o, opt = call(rng, n=140, h=2, k_heads=1, f=8, dv=5, decay="token")

    def halves(o, opt):
        rows = ("q", "k", "v", "log_decay")
        first, state = kernels({x: a[:, :101] if x in rows else a for x, a in o.items()}, opt)
        second, state = kernels({x: a[:, 101:] for x, a in o.items() if x in rows} | {"state": state}, opt)
        return jnp.concatenate([first, second], 1), state

    want, got = results(kernels, o, opt), results(halves, o, opt)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=1e-5 * float(jnp.abs(x).max()), err_msg=name)


def test_a_mapped_call_is_a_longer_batch(rng):
    o, opt = call(rng, n=20, b=2, h=2, k_heads=1, f=4, decay="shared tokens", state=False)

    def gradient(body, scale):
        def loss(q, d):
            out, state = body(o | {"q": q * scale, "log_decay": d}, opt)
            return (out * jnp.arange(out.size).reshape(out.shape)).sum() + state.sum()

        return jax.grad(loss, (0, 1))(o["q"], o["log_decay"])

    scales = jnp.array([1.0, 0.5, 2.0])
    got = jax.jit(jax.vmap(lambda x: gradient(kernels, x)))(scales)
    want = jax.vmap(lambda x: gradient(lambda o, opt: op.linear(o, opt, "reference"), x))(scales)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()))


def test_a_named_body_says_what_it_does_not_support(rng):
    o, opt = call(rng, n=16, f=8)
    with pytest.raises(ValueError, match="'tpu' does not support k of bfloat16 beside q of float32"):
        op.linear(o | {"k": o["k"].astype(jnp.bfloat16)}, opt, "tpu")
    with pytest.raises(ValueError, match="'gpu' does not support q of float16"):
        op.linear(o | {"q": o["q"].astype(jnp.float16)}, opt, "gpu")
    wide, opt = call(rng, n=2, f=4096, dv=512)
    with pytest.raises(ValueError, match="'tpu' does not support states of 4096 x 512"):
        op.linear(wide, opt, "tpu")
    long = {x: jax.ShapeDtypeStruct((4, 2**17, 32, 128), jnp.bfloat16) for x in ("q", "k", "v")}
    with pytest.raises(ValueError, match="'gpu' does not support arrays of 4294967296 entries"):
        op.linear(long, opt, "gpu")
    out, _ = op.linear(wide, opt)  # the choice that is not named works wherever XLA does
    assert jnp.isfinite(out).all()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: the extra tpu-aot is not installed")
def test_128k_tokens_compile_for_a_tpu():
    command = [sys.executable, "-m", "benchmarks.kernel_report", "tpu", "--ops", "linear", "--chips", "v5e"]
    command += ["--decay", "channel", "--layouts", "free", "--json"]
    # A second process may hold the compiler; nothing runs on a chip here.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["kernel"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    assert set(found) == {"linear_forward", "linear_query_gradient", "linear_key_gradient"}
    for row in found.values():
        assert 0 < row["VMEM"] < 48 * 2**20
        assert row["temp, layouts free"] < row["results"] / 10
