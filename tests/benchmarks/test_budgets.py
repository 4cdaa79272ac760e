"""Budgets: met on average by every registered method that can, and said of every other one why not."""

import functools

import jax
import numpy as np
import pytest

from benchmarks.boards import budgets
from jaxattn import registry
from jaxattn.core.types import contract, operand
from jaxattn.tokens import aim_merge
from models import vit
from models.bind import Bound
from models.generate import prefill
from models.language import llm
from models.multimodal import vlm
from train import scenes

MODEL = scenes.scene_config(44, canvas=48, vision_dim=16, vision_heads=2, dim=16, heads=2, hidden=32)  # 36 patches, 3 layers
DEEP = scenes.scene_config(44, canvas=96, vision_dim=16, vision_heads=2, dim=16, heads=2, hidden=32, n_layers=4)
SHARES = (72, 48, 32, 16, 7)
LARGE = vlm.VLMConfig(vit.config(336, 14, 24, 64, 4), llm.config(64, 32, 64, 4), 64)  # the depths of LLaVA-1.5-7B


@pytest.mark.parametrize("n, left", [(144, 72), (144, 36), (144, 32), (144, 16), (49, 10), (100, 99), (36, 1), (9, 9)])
def test_merging_leaves_what_was_asked_for(n, left):
    assert aim_merge(budgets.merge_parts(n, left)).rows(n) == left


def test_plans_meet_their_budgets_and_explain_what_they_cannot():
    entries, unfit = budgets.plan(("random", "full", "aim", "mmtok", "hiprune:alpha=0.2"), (9, 18), MODEL)
    names = ["full", "random 18", "aim 18", "mmtok 18", "hiprune:alpha=0.2 18", "random 9", "aim 9"]
    assert [e.label for e in entries][:7] == names and not unfit
    assert all(e.tokens == e.budget for e in entries)
    by_label = {e.label: e for e in entries}
    assert by_label["aim 18"].layers == (36, 18, 0) and by_label["aim 9"].layers == (18, 9, 0)
    assert [site for site, _ in by_label["aim 9"].reduce] == ["project", "llm"]
    assert by_label["mmtok 9"].reduce[0][0] == "project" and by_label["random 9"].reduce[0][0] == "vision"
    for said, front in (("", "fresh"), (":positions=original", "original")):
        assert budgets.entry("aim" + said, 9, MODEL).reduce[0][1].positions == front
    with pytest.raises(ValueError, match="did you mean hiprune"):
        budgets.plan(("hiprun",), (9,), MODEL)
    with pytest.raises(ValueError, match="budgets: expected a number of tokens from 1 to 36, got 37"):
        budgets.plan(("random",), (37,), MODEL)


@pytest.mark.parametrize("model, shares", [(DEEP, SHARES), (LARGE, (192, 64))], ids=("scenes", "llava"))
def test_every_registered_method_is_planned_or_explained(model, shares):
    names = registry.names("tokens")
    entries, unfit = budgets.plan(names, shares, model, positions="original")
    found = {(e.method, e.budget) for e in entries}
    never = {u.method for u in unfit if u.budget is None}
    sometimes = {(u.method, u.budget) for u in unfit}
    for name in names:
        for budget in shares:
            assert name in never or ((name, budget) in found) != ((name, budget) in sometimes), (name, budget)
    assert all(u.reason for u in unfit)
    assert {"fastv", "pyramiddrop", "transprune", "adaptinfer", "mustdrop", "g_search", "visiondrop_stages"}.isdisjoint(never)
    for e in entries[1:]:
        assert min(e.budget * 0.88, e.budget - 1) <= e.tokens <= e.budget, e
        assert len(e.layers) == model.llm.layers and list(e.layers) == sorted(e.layers, reverse=True), e
    assert all(getattr(r, "positions", "original") == "original" for e in entries for _, r in e.reduce)


def test_a_new_method_needs_no_rule(monkeypatch):
    @contract
    class Toy:
        keep: int = operand("budget")

        def rows(self, n):
            return self.keep

    @contract
    class Odd:
        strength: float = 1.0

    tables = {**registry._factories["tokens"], "toy": lambda keep: Toy(keep), "odd": lambda strength: Odd(strength)}
    monkeypatch.setitem(registry._factories, "tokens", tables)
    entries, unfit = budgets.plan(("toy", "odd"), (9,), MODEL)
    assert entries[1].layers == (9, 9, 9) and entries[1].reduce == (("vision", Toy(9)),)
    assert [(u.method, u.budget) for u in unfit] == [("odd", None)] and "no rule" in unfit[0].reason


@functools.partial(jax.jit, static_argnums=0)
def rows_cached(program, arrays, params, image, tokens):
    caches = prefill(Bound(program, arrays, params), tokens, image=image, max_new=1)[1].caches
    return [c.state.layer.meta.valid.sum(-1) for c in caches]


def test_layers_read_what_the_plan_counts():
    """Against the caches of a run: valid rows of each layer without the words, of a schedule behind another method."""
    e = budgets.entry("g_search", 9, MODEL, positions="original")
    assert len(e.reduce) == 2
    bound = vlm.bind(MODEL, vlm.init(MODEL), reduce=dict(e.reduce), cache="full")
    image = np.random.default_rng(0).uniform(size=(2, 48, 48, 1)).astype(np.float32)
    found = rows_cached(bound.program, bound.arrays, bound.params, image, np.ones((2, 4), np.int32))
    layers = np.concatenate([np.asarray(x).reshape(len(x), 2, -1)[..., 0] for x in found])
    np.testing.assert_array_equal(layers - 4, np.tile(np.array(e.layers)[:, None], 2))
