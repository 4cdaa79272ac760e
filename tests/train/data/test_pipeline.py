import json

import numpy as np
import pytest

from train.data import Batches, lm_dataset, recall_dataset, split_scenes, vit_dataset, vlm_dataset
from train.data.digits import digit_bank


def numbered(size=23, batch_size=4, **stream) -> Batches:
    return Batches(lambda rows: {"row": rows}, size, batch_size, **stream)


def rows(batches, count):
    stream = iter(batches)
    return [next(stream)["row"].tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def kinds():
    scenes = split_scenes("train", 40)
    bank = digit_bank("train", variants=1)
    return {
        "lm": lambda **kw: lm_dataset(length=32, batch_size=4, max_documents=3, **kw),
        "vit": lambda **kw: vit_dataset(bank=bank, batch_size=4, **kw),
        "vlm": lambda **kw: vlm_dataset(scenes=scenes, batch_size=4, with_transcript=True, **kw),
    }


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("kind", ["lm", "vit", "vlm"])
def test_a_restored_stream_continues_as_the_uninterrupted_one(kinds, kind):
    whole = iter(kinds[kind](seed=1))
    want = [next(whole) for _ in range(15)]  # past the end of an epoch of the scenes
    stream = iter(kinds[kind](seed=1))
    for stop in (0, 3, 12):  # at the start, in mid-epoch, in the second epoch
        while_running = iter(kinds[kind](seed=1))
        for i in range(stop):
            same(next(while_running), want[i])
        state = json.loads(json.dumps(while_running.get_state()))
        next(while_running)  # what happens after saving must not matter
        stream.set_state(state)
        for i in range(stop, 15):
            same(next(stream), want[i])


def test_the_state_is_that_of_the_consumer_not_of_the_prefetcher():
    stream = iter(numbered(prefetch=8))
    next(stream)
    fresh = iter(numbered(prefetch=8))
    fresh.set_state(stream.get_state())
    assert next(fresh)["row"].tolist() == rows(numbered(), 2)[1]


def test_every_epoch_is_another_order_of_all_records():
    flat = np.concatenate(rows(numbered(), 23)).reshape(4, 23)
    for epoch in flat:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(23))
    assert len({tuple(epoch) for epoch in flat}) == 4
    assert rows(numbered(), 3) == rows(numbered(), 3) != rows(numbered(seed=1), 3)


def test_processes_side_by_side_are_the_single_process():
    alone = rows(numbered(), 14)
    parts = [rows(numbered(process_index=p, process_count=2), 14) for p in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == alone
    assert all(len(row) == 2 for row in parts[0])


def test_ends_and_remainders():
    in_order = numbered(size=10, shuffle=False, epochs=1)
    assert [b["row"].tolist() for b in in_order] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(b["row"]) for b in numbered(size=10, epochs=1, drop_remainder=False)] == [4, 4, 2]
    assert len([*numbered(size=10, epochs=2)]) == 5 and len(in_order) == 3
    assert rows(numbered(size=3, shuffle=False), 2) == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_no_prefetch_gives_the_same_stream():
    assert rows(numbered(prefetch=0), 8) == rows(numbered(prefetch=3), 8)


def test_lm_batches():
    batches = lm_dataset(length=64, batch_size=3, split="validation", max_documents=4)
    batch = next(iter(batches))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "tokens": ((3, 64), "int32"),
        "targets": ((3, 64), "int32"),
        "loss_mask": ((3, 64), "float32"),
        "segment": ((3, 64), "int32"),
        "position": ((3, 64), "int32"),
    }
    assert batches.info["vocab_size"] == 260 and batch["tokens"].max() < 260
    assert batches.size == -(-(batches.info["tokens"] - 1) // 64)


@pytest.mark.parametrize("task", ["mqar", "needle", "induction"])
def test_recall_batches(task):
    train, held = (recall_dataset(task, count=50, batch_size=50, split=s) for s in ("train", "validation"))
    batch, other = next(iter(train)), next(iter(held))
    assert set(batch) == {"tokens", "targets", "loss_mask", "segment", "position"}
    assert train.info["vocab_size"] * 0.9 < batch["tokens"].max() < train.info["vocab_size"]
    assert not set(map(tuple, batch["tokens"].tolist())) & set(map(tuple, other["tokens"].tolist()))


def test_recall_options_reach_the_task():
    batch = next(iter(recall_dataset("mqar", count=8, batch_size=8, options={"length": 20, "pairs": 3})))
    assert batch["tokens"].shape == (8, 20) and (batch["loss_mask"].sum(1) == 3).all()
    with pytest.raises(ValueError, match="task: expected one of .* got 'copy'"):
        recall_dataset("copy")


def test_vit_batches(kinds):
    batches = kinds["vit"]()
    batch = next(iter(batches))
    assert batch["image"].shape == (4, 16, 16, 1) and batch["image"].dtype == np.float32
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    assert batches.size == 1437 and len(batches.info["classes"]) == 10
    assert vit_dataset(split="validation").size == 360


def test_vlm_batches(kinds):
    batch = next(iter(kinds["vlm"](shuffle=False)))
    scenes = split_scenes("train", 40)
    np.testing.assert_array_equal(batch["image"][..., 0], scenes.images[:4])
    shapes = {name: array.shape for name, array in batch.items()}
    assert shapes == {
        "image": (4, 96, 96, 1),
        "patch_labels": (4, 144),
        "presence": (4, 10),
        "box": (4, 9, 4),
        "questions": (4, 9, 6),
        "answers": (4, 9),
        "kind": (4, 9),
        "transcript_question": (4, 6),
        "transcript_answer": (4, 7),
        **dict.fromkeys(("tokens", "targets", "loss_mask", "segment", "position"), (4, 66)),
    }
    assert {a.dtype.name for n, a in batch.items() if n not in ("image", "presence", "loss_mask")} == {
        "int32"
    }
    assert {batch[n].dtype.name for n in ("image", "presence", "loss_mask")} == {"float32"}
    vision = vlm_dataset(scenes=scenes, mix=())
    assert set(next(iter(vision))) == {"image", "patch_labels", "presence", "box"}


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"batch_size": 3, "process_count": 2},
        {"batch_size": 99, "epochs": 1},
        {"process_index": 2, "process_count": 2},
        {"epochs": 0},
        {"drop_remainder": False, "process_count": 2},
        {"size": 0},
    ],
)
def test_bad_streams_are_named(bad):
    with pytest.raises(ValueError, match=f"{list(bad)[0]}: expected .* got"):
        numbered(**bad)


def test_bad_datasets_are_named():
    for make in (lm_dataset, vit_dataset, vlm_dataset):
        with pytest.raises(ValueError, match="split: expected 'train' or 'validation', got 'test'"):
            make(split="test")
    with pytest.raises(ValueError, match="channels: expected 1"):
        vit_dataset(channels=3)
    with pytest.raises(ValueError, match="channels: expected 1"):
        vlm_dataset(channels=3)
