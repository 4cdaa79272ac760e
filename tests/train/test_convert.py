"""Offline searches and calibrations of methods: run on a model, written, read back by the methods' factories."""

import json

import numpy as np
import pytest

from jaxattn import registry, tokens
from jaxattn.core import artifact
from jaxattn.core.types import Trained as Protocol
from models import vlm
from tests.models.small import LLM, VLM, images, prompts, vlm_params
from train import convert
from train.__main__ import main

RNG = np.random.default_rng(0)
T = 9


@pytest.fixture(scope="module")
def model():
    return convert.Trained(vlm.bind(VLM, vlm_params()))


@pytest.fixture(scope="module")
def batch():
    text = prompts()
    mask = np.zeros(text.shape, np.float32)
    mask[:, [3, 8]] = 1
    segment = np.broadcast_to(1 + np.arange(T) // 5, text.shape).astype(np.int32)
    return {"image": images(), "tokens": text, "targets": np.roll(text, -1, 1), "loss_mask": mask, "segment": segment,
            "position": np.broadcast_to(np.arange(T) % 5, text.shape).astype(np.int32)}  # fmt: skip


def test_heads_that_look_at_the_image(model, batch, tmp_path):
    assert isinstance(model, Protocol)
    found = convert.convert("yopo:share=0.5,first=1", model, [batch, batch], tmp_path / "yopo", header={"split": "train"})
    heads = found["heads"]
    assert heads.shape == (LLM.layers, LLM.block.heads) and heads[0].all() and 0.5 <= heads.mean() < 1
    np.testing.assert_array_equal(found["ratio"][:2], found["ratio"][2:])  # a sample of each row of each batch
    np.testing.assert_array_equal(heads[1:], (found["ratio"][:2, 1:] > found["threshold"]).mean(0) > 0.4)
    path = tmp_path / "yopo.npz"
    arrays, header = artifact.load(path, "yopo_mask")
    assert header == {"maker": "yopo_mask", "arguments": "share=0.5,first=1", "split": "train"}
    np.testing.assert_array_equal(arrays["heads"], heads)
    record = registry.parse("steering", f"yopo:window=None,mlp=1,artifact={path}")
    assert record == tokens.yopo(None, heads.astype(np.float32), mlp=1)


def test_thresholds_of_the_tower(model, batch, tmp_path):
    found = convert.convert("dymu:total=7", model, [batch], tmp_path / "dymu.npz")
    assert found["merges"].sum() == 7 and len(found["merges"]) == VLM.run_layers
    record = registry.parse("tokens", f"dymu:artifact={tmp_path / 'dymu.npz'}")
    seen = model.run(batch, reduce={"vision": record})
    left = np.asarray(seen.told["vision"]["cut.1"]["left"])
    assert left.mean() == found["left"] == VLM.visual - 7


def test_files_and_names(tmp_path):
    path = artifact.save(tmp_path / "a", {"decay": 0.25}, maker="attention_debiasing_trend")
    want = tokens.attention_debiasing(tokens.fastv(4), 0.25)
    assert tokens.attention_debiasing("fastv:keep=4", artifact=str(path)) == want
    with np.load(path) as file:
        assert json.loads(str(file["header"])) == {"maker": "attention_debiasing_trend"}
    for maker, entries, factory, arguments in (
        ("vflowopt_settings", {"ratio": 0.5, "cell": 3.0, "threshold": 1.0, "alpha": 0.0, "layer": -2},
         "vflowopt", dict(ratio=0.5, cell=3.0, threshold=1.0)),
        ("g_search_shares", {"rates": [1.0, 0.5]}, "g_search", dict(rates=(1.0, 0.5))),
        ("adaptinfer_inflections", {"layers": [0, 2, 3]}, "adaptinfer", dict(layers=(0, 2, 3))),
    ):  # fmt: skip
        path = artifact.save(tmp_path / maker, entries, maker=maker)
        make = registry.get("tokens", factory)
        assert make(artifact=str(path)) == make(**arguments)
    with pytest.raises(ValueError, match="expected one made by dymu_thresholds"):
        tokens.dymu(artifact=str(path))
    with pytest.raises(ValueError, match="a file that exists"):
        tokens.dymu(artifact=str(tmp_path / "none.npz"))
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="an .npz with a header"):
        tokens.dymu(artifact=str(tmp_path / "bad.npz"))
    with pytest.raises(ValueError, match="numbers or booleans"):
        artifact.save(tmp_path / "b", {"header": 1.0})
    for text, message in (("yopo:shar=1", "unknown argument 'shar'"), ("duoattention", "needs nothing but a model"),
                          ("nothing", "unknown conversion")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert.conversion(text)
    assert convert.conversion("g-search")[0] == "g_search_shares"


def test_the_command(model, batch, tmp_path, monkeypatch, capsys):
    class Data:
        size = 2

        def fetch(self, rows):
            assert len(rows) == 2
            return batch

    said = {"task": "vlm", "size": 96, "patch": 8, "length": 128, "tokenizer": "byte"}
    monkeypatch.setattr("train.methods.load", lambda run: ({}, {"config": said}))
    monkeypatch.setattr("train.tasks.load", lambda run, **_: model.bound)
    monkeypatch.setattr("train.data.vlm_dataset", lambda *_, **__: Data())
    command = ["--model", "runs/x", "--out", str(tmp_path / "d.npz"), "--batches", "1", "--batch", "2"]
    assert main(["convert", "dymu:total=7", *command]) == 0
    assert "merges: [4, 3]" in capsys.readouterr().out
    header = artifact.load(tmp_path / "d.npz", "dymu_thresholds")[1]
    assert header == {"maker": "dymu_thresholds", "arguments": "total=7", "run": "runs/x", "split": "train", "batches": 1,
                      "batch": 2, "seed": 0}  # fmt: skip
    assert main(["convert", "nothing", *command]) == 1 and "unknown conversion" in capsys.readouterr().err
