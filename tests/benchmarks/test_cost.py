"""Costs by the book: parts of a program, loops whose numbers are known, and what fewer visual tokens have to save."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cost_study
from benchmarks.boards import cost, llava, prefill
from benchmarks.boards.budgets import FULL, Entry
from benchmarks.prefill import Prefill
from jaxattn.core.types import bucket
from models import llm, vit, vlm
from pallas_kernels import _dispatch

X, W = jnp.ones((5, 7)), jnp.ones((4, 7, 7))
ONCE = 2 * 5 * 7 * 7
TOWER = vit.config(12, 3, 3, 16, 2, channels=3, activation="quick_gelu", stem_bias=False, pre_norm=True)
SMALL = vlm.VLMConfig(TOWER, llm.config(40, 4, 16, 2, hidden=32, tie=False), 16)
TILED = dataclasses.replace(SMALL, newline=True, pinpoints=((24, 24), (12, 24)))


def test_known_numbers_are_followed_through_loops():
    def one_layer_asks(x, w, at):
        def body(x, inputs):
            number, w = inputs
            extra = jax.lax.cond(number == at, lambda: x @ w @ w, lambda: x)
            return (jax.jit(jnp.matmul)(x, w), extra.sum())

        return jax.lax.scan(body, x, (jnp.arange(4), w))

    assert cost.matmul_flops(one_layer_asks, X, W, np.int32(2)) == 4 * ONCE + 2 * ONCE
    unknown = jax.ShapeDtypeStruct((), jnp.int32)
    assert cost.matmul_flops(one_layer_asks, X, W, unknown) == 4 * ONCE + 4 * 2 * ONCE, "else the dearest branch, in each round"
    counting = lambda x, w: jax.lax.scan(lambda c, _: ((c[0] @ w[0], c[1] + 1), None), (x, 0), None, length=9)[0][0]  # noqa: E731
    assert cost.matmul_flops(counting, X, W) == 9 * ONCE


def test_scopes_and_what_nothing_reads():
    def f(x, w):
        _ = x @ w[3]  # nobody reads it
        with jax.named_scope("a"):
            y = jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
        with jax.named_scope("b"), jax.named_scope("a"):
            y = jax.jit(jnp.matmul)(y, w[0])
        return jnp.tanh(y) + 1, jnp.sort(x, axis=1)

    found = cost.work(f, X, W, scopes=("b", "a"))
    assert {name: w.matmul for name, w in found.items()} == {"": 0, "b": ONCE, "a": 4 * ONCE}
    assert found[""].other == 2 * 35 + 35 * 3  # tanh and plus; a sort of seven compares in three rounds
    shapes = cost.traced(f, X, W)[1]
    assert shapes[0].shape == (5, 7)


def test_agrees_with_the_compiler_where_that_sees_everything():
    """One layer each: no loop hides anything from XLA's own count."""
    c = llm.config(64, 1, 32, 2, hidden=64)
    bound = llm.bind(c, jax.eval_shape(lambda: llm.init(c)))
    f = lambda params, tokens: llm.forward(bound._replace(params=params), tokens).logits  # noqa: E731
    tokens = jax.ShapeDtypeStruct((1, 48), jnp.int32)
    with _dispatch.unnamed("reference"):
        theirs = jax.jit(f).lower(bound.params, tokens).cost_analysis()["flops"]
        ours = cost.work(f, bound.params, tokens)[""].total
    assert abs(ours / theirs - 1) < 0.05


@pytest.mark.parametrize("crops", [1, 5])
def test_a_prefill_is_its_formula(crops):
    c = SMALL if crops == 1 else TILED
    full = llava.row(Entry(FULL, 16 * crops, (), (16 * crops,) * 4), crops, c, None)
    n = 16 * crops + (8 if crops > 1 else 0) + llava.WORDS  # eight lines of tiles end with a newline
    layer = 2 * n * (4 * 16**2 + 3 * 16 * 32) + 4 * n * n * 16
    assert full["matmul"]["language"] == 4 * layer + 2 * 16 * 40
    tower = 2 * (2 * 17 * (4 * 16**2 + 2 * 16 * 64) + 4 * 17**2 * 16) + 2 * 16 * 27 * 16
    assert full["matmul"]["tower"] == crops * tower and full["flops"]["choosing"] == 0
    assert full["matmul"]["projector"] == crops * 2 * 16 * 2 * 16 * 16
    assert full["cache_bytes"] >= 4 * n * 2 * 16 * 2
    e = llava.plan("fastervlm", 4 * crops, c, crops)
    some = llava.row(e, crops, c, full)
    m = n - 16 * crops + bucket(4 * crops)
    assert some["matmul"]["language"] == 4 * (2 * m * (4 * 16**2 + 3 * 16 * 32) + 4 * m * m * 16) + 2 * 16 * 40
    assert some["matmul"]["tower"] == full["matmul"]["tower"] and 0 < some["flops"]["choosing"] < 0.05 * full["total"]
    assert some["share"] < 0.8 and some["cache_share"] == pytest.approx(m / n, rel=0.15)


def test_study_writes_every_method_or_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "llava", lambda crops: SMALL)
    options = cost_study.Cost(methods=("uniform", "mustdrop_keys"), budgets=(8,), crops=(1,), out=tmp_path)
    assert cost_study.run(options) == 0
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| full |" in text and "| uniform |" in text and "mustdrop_keys" in text.split("Not counted:")[1]
    with pytest.raises(ValueError, match="did you mean"):
        cost_study.run(dataclasses.replace(options, methods=("unifrm",)))


# ------------------------------------------------------------------------------- what fewer tokens save, in operations
@functools.cache
def asked_model():
    return prefill.model(Prefill())


@functools.cache
def parts(method, budget):
    c = asked_model()
    e = Entry(FULL, c.visual, (), (c.visual,) * c.llm.layers) if method == FULL else llava.plan(method, budget, c, 1)
    return llava.row(e, 1, c, None), e


def test_reducing_in_front_of_the_language_model_saves_three_times():
    """576 to 64 tokens, 32 words and more, 512 wide, 8 layers; times are measured by `python -m benchmarks prefill`."""
    full, some = parts(FULL, 576)[0], parts("fastervlm", 64)[0]
    assert full["flops"]["language"] >= 3 * some["flops"]["language"]
    base = full["flops"]["tower"] + full["flops"]["language"]
    for method in ("fastervlm", "hiprune"):
        assert parts(method, 64)[0]["flops"]["choosing"] <= 0.1 * base


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_schedules_do_nine_tenths_of_what_their_counts_allow(method):
    c = asked_model()
    found, e = parts(method, 288)
    b = c.llm.block

    def layer(n):
        n += llava.WORDS
        return 2 * n * (4 * b.dim**2 + 3 * b.dim * b.hidden) + 4 * n * n * b.dim

    allowed = sum(layer(n) for n in e.layers)
    assert allowed >= 0.9 * (found["matmul"]["language"] - 2 * b.dim * c.llm.vocab + found["flops"]["choosing"])
    assert allowed < 0.65 * c.llm.layers * layer(c.visual)
