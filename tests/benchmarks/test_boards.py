"""Boards: costs by the book, budgets met exactly, nothing pruned is nothing lost, tables that say who is behind."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.boards import budgets, cost, plots, table, tokens
from train import scenes
from train.data import SceneConfig, vlm_dataset
from train.data.questions import KINDS

MODEL = scenes.scene_config(44, canvas=48, vision_dim=16, vision_heads=2, dim=16, heads=2, hidden=32)  # 36 patches


def test_flops_count_every_round_of_a_loop():
    x, w = jnp.ones((5, 7)), jnp.ones((3, 7, 7))

    def run(x, w):
        x = jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, w)[0]
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w[0] @ w[0], lambda x: x @ w[0], x)

    assert cost.matmul_flops(run, x, w) == (3 + 2) * 2 * 5 * 7 * 7
    pairs = jnp.ones((2, 4, 3)), jnp.ones((2, 3, 6))
    assert cost.matmul_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *pairs) == 2 * 2 * 4 * 3 * 6
    assert cost.array_bytes({"a": jnp.ones((2, 3)), "b": jnp.ones(5, jnp.bfloat16)}) == 24 + 10


@pytest.fixture(scope="module")
def results():
    dataset = vlm_dataset(split="validation", count=12, config=SceneConfig(canvas=48), mix=scenes.MIX)
    params = scenes.init(MODEL, 0)
    params.pop("aux")
    whole = budgets.entry("uniform", 36, MODEL)
    entries = (*budgets.plan(("random", "mmtok", "aim"), (9,), MODEL)[0], whole)
    lines: list[str] = []
    found = tokens.measure(entries, MODEL, params, dataset, scenes_count=12, size=6, say=lines.append)
    assert "compiled 5/5" in lines[4] and "scored 12/12" in lines[-1]
    texts = tokens.read(entries[1], MODEL, params, dataset.info["vocabulary"], dataset.fetch(np.arange(2))["image"])
    assert len(texts) == 2 and all(len(words) <= tokens.NEW for words in texts)
    return {r.entry.label: r for r in found}, dataset


def test_measured_figures(results):
    results, dataset = results
    full, whole, some = results["full"], results["uniform 36"], results["random 9"]
    # A budget of everything is the full model.
    assert whole.scores["accuracy"] == pytest.approx(full.scores["accuracy"], nan_ok=True)
    assert whole.kept == full.kept == 1.0 and results["aim 9"].kept is None and results["mmtok 9"].kept < 1
    assert sum(full.scores["count"].values()) == 12 * 9 and len(full.seconds) == 2
    # Kept patches are counted where digits are: here against the slots of the first batch.
    assert ((some.slot >= 0).sum(1) == 9).all() and 0 < some.kept < 1
    assert not np.array_equal(some.slot[0], some.slot[1])
    assert some.flops < full.flops and some.cache < full.cache
    # The cache loses the rows that were dropped: 27 of 36 in each of 3 layers, keys and values of 16 floats.
    assert full.cache - some.cache >= 27 * 3 * 2 * 16 * 4 * 0.85
    with pytest.raises(ValueError, match="multiple of the batch of 5"):
        tokens.measure((), MODEL, {}, dataset, scenes_count=12, size=5)


def test_what_merging_mixes():
    slot, labels = np.array([[0, 0, 1, -1], [2, 2, 2, 0]]), np.array([[3, 3, 10, 10], [3, 10, 10, 4]])
    assert tokens.averaged(slot, labels).tolist() == [[False] * 4, [True, True, True, False]]


def made(method, budget, right, kept, yes=0.9, no=0.9):
    accuracy = dict.fromkeys(KINDS, right)
    scores = {"accuracy": accuracy, "count": dict.fromkeys(KINDS, 4000), "yes_recall": yes, "no_recall": no}
    seconds = np.array([1.0, 2.0]) * (1 if method == "full" else 0.5)
    entry = budgets.Entry(method, budget, (), (budget,) * 3, kept is None)
    slot = np.full((2, 16), -1, np.int32)
    slot[:, :4] = [0, 1, 1, 2]
    return tokens.Result(entry, scores, kept, 0.3 if kept is None else None, seconds, 1e6, 2048, 50, 1.0, slot)


BOARD = [
    made("full", 16, 0.9, 1.0), made("random", 8, 0.7, 0.5), made("blind", 8, 0.5, 0.2), made("eager", 8, 0.6, 0.9, no=0.2),
    made("merging", 8, 0.4, None), made("good", 8, 0.8, 0.9), made("near", 8, 0.699, 0.4),
]  # fmt: skip


def test_tables_rank_within_a_budget_and_say_why():
    lines = table.markdown(BOARD).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["full", "good", "random", "near", "eager", "blind", "merging"]
    assert "**80.0**" in lines[3] and "| 0.50 |" in lines[3] and "merged" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1
    assert table.rich_table(BOARD, "board").row_count == len(BOARD)
    blind, eager, merging = table.below_random(BOARD)
    assert blind.startswith("blind 8 is below random (50.0 against 70.0)") and "20.0 % of their patches" in blind
    assert "says yes too often" in eager and "patches move, and 30.0 % of the digits' patches" in merging


def test_pictures(tmp_path, monkeypatch):
    grey = np.full((8, 8, 3), 0.5)
    shaded = plots.shade(grey, BOARD[1].slot[0], (4, 4))
    np.testing.assert_allclose(shaded[2:], 0.11)  # dropped
    assert (shaded[:2] >= 0.5).all()
    plots.chart(BOARD, tmp_path / "chart.png")
    plots.overlays(BOARD, 8, grey[None, ..., 0].repeat(2, 0), (4, 4), tmp_path / "overlays.png")
    for name in ("chart.png", "overlays.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"jaxattn\[plot\]"):
        plots.require()
