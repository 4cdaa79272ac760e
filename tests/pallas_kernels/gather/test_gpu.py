import importlib.util
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from pallas_kernels.gather import gpu
from tests.pallas_kernels.gather.calls import CALLS, call, check_hidden, compare


@pytest.mark.parametrize("name", list(CALLS)[1::2])  # among them pages of a pool, interleaved turns, own lists
def test_values_and_gradients_are_the_references(rng, name):
    o, opt = call(rng, **CALLS[name])
    tol = 2e-2 if CALLS[name].get("dtype") == jnp.bfloat16 else 1e-5
    compare(lambda o, opt: gpu.gather(o, opt, interpret=True), o, opt, tol)


def test_parts_of_a_list_are_one_softmax(rng, monkeypatch):
    """One query's list in three parts, some of them empty."""
    monkeypatch.setattr(gpu, "PROGRAMS", 6)
    o, opt = call(rng, n=1, m=400, b=2, h=2, g=1, unit=16, k=20, sums="heads", key_bias=2)
    assert gpu._plan(gpu.lists.shape_of(o, opt), opt, {"q": o["q"]}, gpu.FORWARD).parts == 3
    compare(lambda o, opt: gpu.gather(o, opt, interpret=True), o, opt, 1e-5)


def test_what_is_hidden_may_hold_anything(rng):
    check_hidden(rng, lambda o, opt: gpu.gather(o, opt, interpret=True), lists=True)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no CUDA compiler: the extra gpu-aot is not installed"
)
def test_lists_over_128k_tokens_compile_for_a_gpu():
    """No spill, and tensor cores in every kernel."""
    command = [sys.executable, "-m", "benchmarks.kernel_report", "gpu", "--ops", "gather", "--json"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {row["kernel"] for row in found} == {"gather_forward", "gather_backward"}
    for row in found:
        assert row["spills"] == 0 and row["wgmma"] + row["mma"] > 0
