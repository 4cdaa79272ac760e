import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import kernel_cases, tune
from pallas_kernels import _tuned


def test_the_fastest_size_that_compiles_is_written(tmp_path, monkeypatch, capsys):
    """Sizes are the turns of a loop: fewer are faster, and one cannot be compiled."""

    def tuning(sizes, dtype, implementation):
        def program(x):
            turns = _tuned.sizes("flash", implementation, "loop", dtype, {"turns": 3000})["turns"]
            if turns < 0:
                raise ValueError("turns: expected a positive number")
            return lax.fori_loop(0, turns, lambda i, x: x @ x * 1e-3, x)

        candidates = ({"turns": 6000}, {"turns": 10}, {"turns": -1})
        return [kernel_cases.Tunable("loop", dtype, candidates, program, (jnp.ones((sizes.tokens, sizes.tokens)),))]

    monkeypatch.setattr(tune.kernel_cases, "load", lambda name: types.SimpleNamespace(tuning=tuning))
    path = tmp_path / "chip.json"
    assert tune.run(tune.Tune(tokens=32, head_dims=(8,), repeats=3, out=path)) == 0
    (found,) = _tuned.read(path)
    assert found["sizes"] == {"turns": 10} and found["milliseconds"] < found["shipped milliseconds"]
    text = capsys.readouterr().out
    assert "best, kept" in text and "refused: turns: expected" in text

    monkeypatch.setattr(tune.kernel_cases, "load", lambda name: types.SimpleNamespace())
    with pytest.raises(ValueError, match="op: expected one that can be tuned, got 'flash'"):
        tune.run(tune.Tune())


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_what_flash_tunes_is_read_by_its_bodies(implementation):
    sizes = kernel_cases.Sizes(tokens=64, heads=2, kv_heads=1, head_dim=8, block=16, entries=2)
    for one in kernel_cases.load("flash").tuning(sizes, "float32", implementation):
        asked = []

        def note(op, name, shape, dtype, default, asked=asked):
            asked.append((op, name, shape, jnp.dtype(dtype).name, tuple(default)))
            return dict(default)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_tuned, "sizes", note)
            jax.make_jaxpr(one.program)(*one.args)
        held = [x for x in asked if x[:4] == ("flash", implementation, one.shape, one.dtype)]
        assert held and all(set(sizes) <= set(held[0][4]) for sizes in one.candidates)
