import numpy as np
import pytest

from train.data import recall

TASKS = {
    "mqar": lambda count, **kw: recall.mqar(count, length=64, pairs=6, vocab=40, **kw),
    "needle": lambda count, **kw: recall.needle(count, length=50, vocab=30, **kw),
    "induction": lambda count, **kw: recall.induction(count, period=12, repeats=3, vocab=20, **kw),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_follows_its_cue_earlier_in_the_context(task):
    record = TASKS[task](200)
    tokens, targets = record["tokens"], record["targets"]
    asked = record["loss_mask"] > 0
    assert asked.any(1).all()
    for row, at in zip(*np.nonzero(asked), strict=True):
        earlier = np.flatnonzero(tokens[row, :at] == tokens[row, at])
        followers = set(tokens[row, earlier + 1][earlier + 1 < at].tolist()) - {0}
        if task == "needle":
            assert len(earlier) == 1
        assert followers == {targets[row, at]}, "recoverable, and in one way only"


@pytest.mark.parametrize("task", TASKS)
def test_sequences_depend_on_seed_and_number_alone(task):
    many, part, other = TASKS[task](20, seed=5), TASKS[task](4, seed=5, start=7), TASKS[task](20, seed=6)
    for name in many:
        np.testing.assert_array_equal(many[name][7:11], part[name])
        assert many[name].dtype == (np.float32 if name == "loss_mask" else np.int32)
    assert (many["tokens"] != other["tokens"]).any()
    assert len(np.unique(many["tokens"], axis=0)) == 20


def test_mqar_asks_every_key_once_and_mostly_soon():
    record = recall.mqar(300, length=128, pairs=8, vocab=64, power=0.01)
    assert (record["loss_mask"].sum(1) == 8).all()
    asked = np.nonzero(record["loss_mask"])[1]
    assert asked.min() >= 16 and (asked % 2 == 0).all()
    spread = np.nonzero(recall.mqar(300, length=128, pairs=8, vocab=64, power=1.0)["loss_mask"])[1]
    assert np.median(asked) < 40 and abs(np.median(spread) - 72) < 6  # power 1: every slot alike


def test_needle_lies_at_the_depth_asked_for():
    for depth, at in ((0.0, 0), (0.5, 20), (1.0, 40)):
        tokens = recall.needle(5, length=43, vocab=9, depth=depth)["tokens"]
        np.testing.assert_array_equal(tokens[:, at], 1)
    drawn = np.argmax(recall.needle(400, length=43, vocab=9)["tokens"] == 1, axis=1)
    assert drawn.min() < 3 and drawn.max() > 37


def test_induction_repeats_and_asks_from_the_second_round():
    record = recall.induction(3, period=5, repeats=3, vocab=9)
    np.testing.assert_array_equal(record["tokens"][:, :5], record["tokens"][:, 10:])
    np.testing.assert_array_equal(
        record["loss_mask"], np.repeat([[0, 1, 1]], 5, 1).reshape(1, 15).repeat(3, 0)
    )
    np.testing.assert_array_equal(record["targets"][:, 5:14], record["tokens"][:, 6:15])


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: recall.mqar(1, length=31, pairs=8), "length"),
        (lambda: recall.mqar(1, vocab=16, pairs=8), "vocab"),
        (lambda: recall.mqar(1, power=0), "power"),
        (lambda: recall.needle(1, depth=1.5), "depth"),
        (lambda: recall.needle(1, length=2), "length"),
        (lambda: recall.induction(1, repeats=1), "repeats"),
        (lambda: recall.induction(1, vocab=32, period=32), "vocab"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"{name}.*: expected .* got"):
        make()
