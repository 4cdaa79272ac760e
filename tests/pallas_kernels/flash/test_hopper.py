import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jaxattn.core import mask as masks
from pallas_kernels import flash as op
from pallas_kernels.flash import hopper
from tests.pallas_kernels.flash.calls import RICH, call, compare

# JAX's GPU interpreter runs warp groups as threads, with barriers, bulk copies and a check for races.
interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


def on_hopper() -> bool:
    return jax.default_backend() in ("gpu", "cuda") and jax.devices()[0].compute_capability == "9.0"


# Few programs each: the interpreter compiles every warp group of every program anew.
SMALL = {
    "two warp groups, heads in one block, two units a step, parts that need no mask": dict(
        n=64, m=192, h=2, g=1, d=64, unit=64, mask=masks.causal(), padded=3
    ),
    "one warp group, padded heads and units, live ranges": dict(n=20, m=90, d=20, dv=30, unit=24, k=3, mask=RICH, bounds=True),
}
LARGE = {
    "1": dict(n=1, m=17, h=3, d=64, unit=8),
    "127": dict(n=127, b=2, h=4, g=2, d=80, dv=128, tile=40, unit=24, hs=2, k=4, mask=masks.causal(), bounds=True),
    "129": dict(n=129, b=2, h=2, d=64, tile=64, unit=33, k=3, mask=RICH, padded=4),
    "1000": dict(n=1000, h=2, g=1, d=128, tile=256, unit=250, mask=masks.causal()),
    "4096": dict(n=4096, b=2, h=8, g=2, d=128, tile=128, unit=128, hs=2, k=8, mask=masks.window(700), padded=100),
    "no softmax": dict(n=300, h=2, d=64, tile=128, unit=64, k=3, mask=masks.causal(), normalizer="none"),
}


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients_are_the_references_without_races(rng, capfd, name):
    o, opt = call(rng, dtype=jnp.bfloat16, **SMALL[name])
    params = interpreter.InterpretGPUParams(detect_races=True)
    compare(lambda o, opt: hopper.flash(o, opt, interpret=params), o, opt, 2e-2)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.skipif(not on_hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", LARGE)
def test_values_and_gradients_on_a_device(rng, name, dtype):
    o, opt = call(rng, dtype=dtype, **LARGE[name])
    compare(lambda o, opt: op.flash(o, opt, "hopper"), o, opt, 2e-2)


@pytest.mark.skipif(not on_hopper(), reason="no Hopper GPU")
def test_nan_reaches_only_who_sees_it_on_a_device(rng):
    o, opt = call(rng, n=300, h=2, d=64, tile=64, unit=64, mask=masks.causal(), dtype=jnp.bfloat16)
    spoiled = o | {"v": o["v"].at[:, 200].set(jnp.nan)}
    out, _ = op.flash(spoiled, opt, "hopper")
    want, _ = op.flash(spoiled, opt, "reference")
    assert (jnp.isnan(out) == jnp.isnan(want)).all() and jnp.isnan(out).any()


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(dtype=jnp.float32), "float32: expected bfloat16 or float16"),
        (dict(d=200), "heads of 200: expected at most 128"),
        (dict(key_bias=1), "floats per row or per key"),
    ],
)
def test_what_it_does_not_support_is_said(rng, change, why):
    o, opt = call(rng, **dict(n=16, tile=8, unit=8, dtype=jnp.bfloat16) | change)
    with pytest.raises(ValueError, match=f"'hopper' does not support {why}"):
        op.flash(o, opt, "hopper")


def test_a_compiler_that_miscompiles_masks_is_refused(rng, monkeypatch):
    o, opt = call(rng, n=16, tile=8, unit=8, dtype=jnp.bfloat16, mask=masks.causal())
    for version, refused in ((12080, True), (12090, True), (13000, False)):
        client = types.SimpleNamespace(platform_version=f"PJRT C API\ncuda {version}")
        device = types.SimpleNamespace(compute_capability="9.0", client=client)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        why = hopper.BODY.refusal(o, opt)
        assert ("ptxas" in why) if refused else why is None, why
        assert hopper.BODY.refusal(o, dataclasses.replace(opt, mask=None)) is None


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no CUDA compiler: the extra gpu-aot is not installed"
)
def test_128k_tokens_compile_for_a_gpu():
    """No spill, tensor cores in every kernel, bulk copies in those of this body."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernel_report",
        "gpu",
        "--ops",
        "flash",
        "--implementation",
        "hopper",
        "--json",
    ]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["kernel"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    assert set(found) == {"flash_forward", "flash_query_gradient", "flash_key_gradient"}
    for row in found.values():
        assert row["spills"] == 0 and row["wgmma"] > 0
        assert row["tma"] > 0 or row["kernel"] == "flash_key_gradient"
