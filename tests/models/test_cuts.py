"""Cuts inside a stack: evidence of the next layer for the rows that ask, and no others projected."""

import jax
import numpy as np

from benchmarks.boards import cost
from models import cuts, vlm
from models.bind import Bound
from pallas_kernels import _dispatch
from tests.models.small import VLM, images, prompts, vlm_params

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # programs that run once


def measured(f, bound):
    """(what it returns, its matrix products' operations)."""
    args = bound.arrays, bound.params
    return jax.jit(f).lower(*args).compile(compiler_options=FAST)(*args), cost.matmul_flops(f, *args)


def test_few_rows_that_ask_are_projected_alone(monkeypatch):
    bound = vlm.bind(VLM, vlm_params(), reduce={"llm": "pyramiddrop:layers=(1,),ratios=(0.5,),query=3"})

    def look(arrays, params):
        out, _ = vlm.forward(Bound(bound.program, arrays, params), images(), prompts(), phase="prefill")
        return out.logits, out.stack.streams.slots["vision"]

    with _dispatch.unnamed("reference"):
        few, work = measured(look, bound)
        monkeypatch.setattr(cuts, "_asked_rows", lambda *_: None)
        every, more = measured(lambda *a: look(*a), bound)
    np.testing.assert_array_equal(few[1], every[1])
    np.testing.assert_allclose(few[0], every[0], atol=1e-5)
    assert work < more and (np.asarray(few[1]) < 0).any()
