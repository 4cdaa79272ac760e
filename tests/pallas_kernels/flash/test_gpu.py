import importlib.util
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from jaxattn.core import mask as masks
from pallas_kernels import flash as op
from pallas_kernels.flash import gpu
from tests.pallas_kernels.flash.calls import CALLS, call, compare


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_references(rng, name):
    o, opt = call(rng, **CALLS[name])
    tol = 2e-2 if CALLS[name].get("dtype") == jnp.bfloat16 else 1e-5
    compare(lambda o, opt: gpu.flash(o, opt, interpret=True), o, opt, tol)


def test_units_and_blocks_larger_than_a_program_holds(rng):
    """Units of 100 keys in two parts, and row blocks of 136 rows in several, with heads of two sizes that are padded."""
    o, opt = call(rng, n=130, m=300, b=2, h=4, g=2, d=20, dv=130, tile=68, unit=100, k=2, mask=masks.causal(), bounds=True)
    compare(lambda o, opt: gpu.flash(o, opt, interpret=True), o, opt, 1e-5)


def test_a_named_body_says_what_it_does_not_support(rng):
    o, opt = call(rng, n=16, tile=8, unit=4)
    with pytest.raises(ValueError, match="'gpu' does not support bias that differs by query with units of 4 keys"):
        op.flash(o | {"bias": jnp.zeros((1, 1, 16, 16))}, opt, "gpu")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no CUDA compiler: the extra gpu-aot is not installed"
)
def test_128k_tokens_compile_for_a_gpu():
    """No spill, and tensor cores in every kernel."""
    command = [sys.executable, "-m", "benchmarks.kernel_report", "gpu", "--ops", "flash", "--json"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["kernel"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    assert set(found) == {"flash_forward", "flash_query_gradient", "flash_key_gradient"}
    for row in found.values():
        assert row["spills"] == 0 and row["wgmma"] > 0
