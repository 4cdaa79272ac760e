import importlib.util
import json
import os
import subprocess
import sys

import pytest

from pallas_kernels.linear import gpu
from tests.pallas_kernels.linear.calls import CALLS, call, check, compare


def kernels(o, opt):
    return gpu.linear(o, opt, interpret=True)


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_references(name):
    check(kernels, name)


def test_widths_of_several_tiles(rng):
    """Features and value columns in three tiles each, and in two for the kernel that writes outputs."""
    o, opt = call(rng, n=70, h=2, k_heads=1, f=66, dv=70, decay="token", chunk=32)
    compare(kernels, o, opt, 1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no CUDA compiler: the extra gpu-aot is not installed"
)
def test_128k_tokens_compile_for_a_gpu():
    """No spill, and tensor cores in every kernel."""
    command = [sys.executable, "-m", "benchmarks.kernel_report", "gpu", "--ops", "linear", "--json"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["kernel"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    gradients = {"linear_state_gradients", "linear_value_gradient", "linear_key_gradient"}
    assert set(found) == {"linear_states", "linear_output"} | gradients
    for row in found.values():
        assert row["spills"] == 0 and row["wgmma"] + row["mma"] > 0
