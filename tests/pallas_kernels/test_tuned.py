import json

import jax
import jax.numpy as jnp
import pytest

import jaxattn as ja
from jaxattn.core import mask as masks
from jaxattn.core.attend import lower, make_call
from pallas_kernels import _tuned
from pallas_kernels.flash import flash, gpu, tpu
from tests.pallas_kernels.flash.calls import call

ENTRY = {"op": "flash", "implementation": "xla", "shape": "d16", "dtype": "float32", "sizes": {"tile": 32, "unit": 64}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuned, "DIRECTORY", tmp_path)
    return tmp_path


def dense_options(n=128, d=8, dtype=jnp.float32):
    x = jnp.zeros((1, n, 1, d), dtype)
    return lower(make_call(x, x, x, mask=masks.causal()))[1]


def test_what_was_measured_on_this_chip_is_used(folder, rng):
    shipped = dense_options()
    path = _tuned.write(ENTRY)
    assert path == folder / f"{_tuned.chip()}.json" and path.name == "cpu.json"
    found = dense_options()
    assert (found.tile, found.unit) == (32, 64) != (shipped.tile, shipped.unit)
    assert dense_options(dtype=jnp.bfloat16).tile == shipped.tile
    _tuned.write(ENTRY | {"sizes": {"tile": 64, "unit": 64}})  # in place of the first, and seen at once
    assert dense_options().tile == 64 and len(_tuned.read(path)) == 1
    x = jnp.asarray(rng.normal(size=(1, 100, 1, 8)), jnp.float32)
    want = ja.attend(x, x, x, mask=masks.causal(), implementation="reference").out
    assert jnp.abs(ja.attend(x, x, x, mask=masks.causal()).out - want).max() < 1e-5


def test_kernels_take_sizes_that_divide_their_blocks(folder, rng):
    o, opt = call(rng, n=96, d=20, tile=96, unit=24)
    key = {"op": "flash", "implementation": "gpu", "shape": "forward d32", "dtype": "float32"}
    _tuned.write(key | {"sizes": {"rows": 64, "keys": 128, "warps": 2}})
    p = gpu.plan(o, opt)
    found = gpu.tuned(p, "forward")
    assert found["warps"] == 2 and found["stages"] == 2
    assert p.rows % found["rows"] == 0 and p.unit_rows % found["keys"] == 0
    assert gpu.tuned(p, "queries")["warps"] != 2
    out = jax.jit(lambda o: gpu.flash(o, opt, interpret=True)[0])(o)
    assert jnp.abs(out - flash(o, opt, "reference")[0]).max() < 1e-5
    _tuned.write(key | {"implementation": "tpu", "shape": "d32", "sizes": {"keys": 48}})
    assert tpu.BODY.plan(o, opt).step == 2


def test_a_file_that_holds_something_else_is_named(folder):
    for text in ("[]", '{"entries": [{"op": "flash"}]}', json.dumps({"entries": [ENTRY | {"sizes": {"tile": "big"}}]}), "{"):
        (folder / "cpu.json").write_text(text)
        with pytest.raises(ValueError, match=r"cpu\.json: expected .*sizes"):
            dense_options()
        (folder / "cpu.json").unlink()
