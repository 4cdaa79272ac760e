"""The long board of token methods: intervals, what is kept on disk, and the pages made of it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.boards import budgets, latency, outcomes, ranking, scene_exam, token_page
from benchmarks.boards.tokens import answer
from benchmarks.tokens import Tokens, counts_of, planned
from models.multimodal import vlm
from train import scenes
from train.data import SceneConfig, vlm_dataset

MODEL = scenes.scene_config(44, canvas=48, vision_dim=16, vision_heads=2, dim=16, heads=2, hidden=32)  # 36 patches
RNG = np.random.default_rng(0)


# ---------------------------------------------------------------------------------------------------------- intervals
def test_shares_of_resamples_against_loops():
    right, kind = RNG.random((3, 7, 5)) < 0.6, RNG.integers(0, 2, (7, 5))
    exam = outcomes.Exam(("a", "b"), ("a", "b"), np.stack([kind == 0, kind == 1]))
    d = ranking.draws(3, 7, 50, seed=1)
    found = ranking.shares(np.stack([exam.correct(r) for r in right]), exam.count, d)
    assert (d.checkpoints[0] == 1).all() and (d.images[0] == 1).all()
    assert (d.checkpoints.sum(1) == 3).all() and (d.images.sum(1) == 7).all()
    for r in (0, 7, 31):
        for k in range(2):
            hits, asked = 0, 0
            for c in range(3):
                for s in range(7):
                    weight = d.checkpoints[r, c] * d.images[r, s]
                    hits += weight * right[c, s, kind[s] == k].sum()
                    asked += weight * (kind[s] == k).sum()
            assert found[r, k] == pytest.approx(hits / asked)


def test_intervals_have_the_width_of_a_binomial():
    """Of one checkpoint and one question an image: the normal approximation, from another formula."""
    n, p = 600, 0.7
    exam = outcomes.Exam(("a",), ("a",), np.ones((1, n, 1), bool))
    make = lambda p: outcomes.Outcome(RNG.random((n, 1)) < p)  # noqa: E731
    entries = [budgets.Entry(m, 8, (), (8,)) for m in ("a", "b", "random")]
    answered = {("a 8", "x"): make(p), ("b 8", "x"): make(p + 0.1), ("random 8", "x"): make(0.4)}
    found = ranking.standings(entries, answered, ["x"], exam)
    low, high = ranking.interval(found[0].means)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / n), rel=0.15) and low < found[0].mean < high
    gap, low, high = ranking.difference(found[1], found[0])
    width = 2 * 1.96 * np.sqrt((p * (1 - p) + (p + 0.1) * (0.9 - p)) / n)
    assert high - low == pytest.approx(width, rel=0.15) and gap == pytest.approx(found[1].mean - found[0].mean)
    assert ranking.separated(found[0], found[1]) and not ranking.separated(found[0], found[0])
    # The same answers differ by nothing, however few they are: differences are paired.
    twin = ranking.standings(entries[:1] * 2, answered, ["x"], exam)
    assert ranking.difference(*twin) == (0.0, 0.0, 0.0)
    assert [s.entry.method for s in ranking.at_budget(found, 8)] == ["b", "a", "random"]
    assert ranking.retained(found[0], found[1], "a")[0] == pytest.approx(found[0].mean / found[1].mean)
    assert ranking.standings(entries, answered, ["x", "y"], exam) == []  # y has answered nothing
    assert not ranking.unlearned(answered["b 8", "x"], exam)
    assert 0.3 < ranking.unlearned(answered["random 8", "x"], exam)["a"] < 0.5


def test_times_are_shares_of_the_base_in_the_same_round():
    clock = {"slow": 0}

    def spin(n):
        def call():
            clock["slow"] += n
            return np.linalg.norm(np.ones((n, 64)) @ np.ones((64, 64)))

        return call

    found, base = latency.ratios(spin(8), {str(i): spin(8 * (1 + i % 2)) for i in range(11)}, rounds=3)
    assert set(found) == {str(i) for i in range(11)} and all(len(x) == 3 and (x > 0).all() for x in found.values())
    assert len(base) == 3 * 2  # two groups, each with a base of its own


# ----------------------------------------------------------------------------------------------------------- on disk
@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    dataset = vlm_dataset(split="validation", count=8, config=SceneConfig(canvas=48), mix=scenes.MIX)
    batches = scene_exam.batches_of(dataset, 8, 4)
    words = dataset.info["vocabulary"].ids
    exam = scene_exam.exam_of(batches, words["yes"], words["no"])
    params = [scenes.init(MODEL, seed) for seed in (0, 1)]
    checkpoints = [(f"seed{i}", f"of {i}", {k: v for k, v in p.items() if k != "aux"}) for i, p in enumerate(params)]
    entries, unfit = budgets.plan(("random", "fastv", "quota"), (18,), MODEL, positions="original")
    lines = []
    make = lambda some: scene_exam.Board(MODEL, some, batches, outcomes.Store(folder / "results"), 1, 2, lines.append)  # noqa: E731
    first = make(checkpoints[:1]).work(entries[:2])
    second = make(checkpoints).work(entries)
    return dict(folder=folder, exam=exam, entries=entries, unfit=unfit, first=first, second=second, make=make,
                checkpoints=checkpoints, batches=batches)  # fmt: skip


def test_a_board_goes_on_where_it_was(worked, monkeypatch):
    """Checkpoints and methods are added; what is there is read, not answered again."""
    found, costs, refused = worked["second"]
    assert set(found) == {(e.label, c) for e in worked["entries"] for c in ("seed0", "seed1")} and not refused
    np.testing.assert_array_equal(found["random 18", "seed0"].right, worked["first"][0]["random 18", "seed0"].right)
    assert costs["random 18"] == worked["first"][1]["random 18"]
    monkeypatch.setattr(scene_exam, "compiled", lambda *_: pytest.fail("compiled again"))
    again, cost, _ = worked["make"](worked["checkpoints"]).work(worked["entries"])
    assert cost == costs and set(again) == set(found)
    for key, outcome in found.items():
        np.testing.assert_array_equal(again[key].right, outcome.right)
        np.testing.assert_array_equal(again[key].slot, outcome.slot)
        assert dataclasses.replace(again[key], right=0, slot=0) == dataclasses.replace(outcome, right=0, slot=0)
    # Other settings have other files, and a damaged one is made anew.
    keys = [outcomes.entry_key(budgets.entry(m, 18, MODEL)) for m in ("random", "random:seed=1", "fastv")]
    store = outcomes.Store(worked["folder"] / "results")
    assert len({store.path({"what": "x", **k}) for k in keys}) == 3
    path = store.path({"what": "x", **keys[0]})
    path.write_text("{")
    assert store.load({"what": "x", **keys[0]}) is None


def test_what_was_measured(worked):
    found, costs, _ = worked["second"]
    full, some, cut = (found[label, "seed1"] for label in ("full", "random 18", "fastv 18"))
    assert full.live == (36, 36) and full.kept == 1 and some.live == (18, 18) and cut.live == (36, 9)
    assert 0 < some.kept < 1 and not some.merged and some.slot.shape == (2, 36)
    assert ((cut.slot >= 0).sum(1) == 9).all()  # of a cut inside: what its last layer reads
    assert costs["full"]["prefill"] > 0 and costs["random 18"]["flops"] < costs["full"]["flops"]
    assert costs["random 18"]["cache"] < costs["full"]["cache"] and costs["fastv 18"]["decode"] > 0
    exam = worked["exam"]
    assert exam.count[:, 0].sum() == exam.count[:, exam.names.index("yes")].sum() + exam.count[:, exam.names.index("no")].sum()
    assert exam.count[:, : len(exam.names) - 2].sum() == 8 * 9


def test_pages(worked, tmp_path):
    pytest.importorskip("matplotlib")
    found, costs, _ = worked["second"]
    facts = dict(checkpoints=["seed0", "seed1"], images=8, tokens=36, layers=3, positions="original", title="T", about="A")
    images = worked["batches"][0]["image"][:2, ..., 0]
    token_page.write(tmp_path / "b", worked["entries"], found, costs, worked["unfit"], worked["exam"], facts,
                     unfair=("count_all", "count_of"), images=images, grid=(6, 6), resamples=200)  # fmt: skip
    text, record = (tmp_path / "b.md").read_text(), json.loads((tmp_path / "b.json").read_text())
    rows = [line for line in text.splitlines() if line.startswith("| ") and "method" not in line and "---" not in line]
    assert len(rows) == 3 and len({row.count("|") for row in rows}) == 1 and rows[0].startswith("| full |")
    assert "- quota: it shares a budget among the frames" in text and "pairs of methods are separated" in text
    by = {r["method"]: r for r in record["entries"]}
    assert by["fastv"]["layers"] == [36, 9, 9] and by["random"].get("vs_random") is None and len(by["fastv"]["vs_random"]) == 3
    assert all((tmp_path / n).read_bytes()[:4] == b"\x89PNG" for n in ("b.png", "b-kept.png"))


# ------------------------------------------------------------------------------------------------------- command line
def test_mistakes_are_found_before_any_training(tmp_path, capsys):
    where = ["--checkpoints", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--report", str(tmp_path)]
    for flags, message in (
        (["--methods", "hiprun"], "did you mean hiprune"),
        (["--budgets", "120"], "expected percent in (0, 100], got 120"),
        (["--scenes", "30"], "expected a multiple of the batch of 20, got 30"),
        (["--model", str(tmp_path)], "model, data: expected both or neither"),
        (["--model", "m", "--data", "d", "--trained", "r"], "trained: expected none with --model"),
        (["--no-train"], "expected a trained model in"),
    ):
        assert main(["tokens", *where, *flags]) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert counts_of((50, 33, 22, 11, 5), 144) == (72, 48, 32, 16, 7)


def test_every_registered_method_is_on_the_board():
    from jaxattn import registry
    from train import tasks

    model = tasks.scene_model(Tokens().training(0), 44)
    entries, unfit = planned(Tokens(budgets=(11, 50)), model)
    assert {e.method for e in entries} | {u.method for u in unfit} == {"full", *registry.names("tokens")}
    assert [e.budget for e in entries][:3] == [144, 16, 16] and model.llm.layers == 4


def test_trained_methods_answer_with_their_own_parameters(worked, tmp_path):
    """A run's entry differs from the checkpoint's by what it was trained to; a checkpoint without a run does not answer."""
    from benchmarks.boards import trained
    from models.bind import Bound

    name, identity, params = worked["checkpoints"][0]
    fresh = vlm.bind(MODEL, None, reduce={"project": "textmonkey:keep=9"}).arrays["trained"]
    taught = jax.tree.map(lambda x: x + 0.5, fresh)
    runs = [trained.Run("textmonkey:keep=9", Path(tmp_path / name), "a run", {**params, "sockets": {"sites": parts["sites"]}})
            for parts in (fresh, taught)]  # fmt: skip
    (entry,), unfit = trained.plan(runs[:1], (18,), MODEL)
    plain = budgets.entry("textmonkey", 18, MODEL)
    assert entry.label == "textmonkey (trained) 18" and entry.reduce == plain.reduce and not unfit
    assert trained.plan([dataclasses.replace(runs[0], method="dyvte:hidden=4")], (18,), MODEL)[0][0].layers == (18,) * 3
    answered = []
    for run in runs:
        known = trained.by_checkpoint([run], {c[0]: tmp_path / c[0] for c in worked["checkpoints"]})
        store = outcomes.Store(tmp_path / str(len(answered)))
        board = scene_exam.Board(MODEL, worked["checkpoints"], worked["batches"], store, 0, 2, list, known)
        program = scene_exam.compiled(entry, MODEL, board.params, worked["batches"][0])
        assert [c[:2] for c in board.asked(entry)] == [(name, "a run")] and len(board.asked(plain)) == 2
        answered.append(program.run(board.asked(entry)[0][2], worked["batches"][0], 0)[0])
    bare = vlm.bind(MODEL, params, reduce=dict(plain.reduce))
    batch = {x: worked["batches"][0][x] for x in scene_exam.INPUTS}
    want = answer(*Bound(bare.program, {**bare.arrays, "trained": taught}, params), batch, jax.random.key(0))[0]
    np.testing.assert_array_equal(answered[1], want)
    assert (np.asarray(answered[0]) != np.asarray(answered[1])).any()
    with pytest.raises(ValueError, match="two runs of textmonkey"):
        trained.by_checkpoint(runs, {name: tmp_path / name})
