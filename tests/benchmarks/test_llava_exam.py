"""`python -m benchmarks tokens --model PATH --data FILE` on a tiny LLaVA with the recorded tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import models
from benchmarks.__main__ import main
from benchmarks.boards import llava_exam
from models.hub import images
from models.hub.text import read_text
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

WORDS = Path(__file__).parents[1] / "golden" / "hf" / "words"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model of 9 visual tokens, three pictures, and questions whose answers are the model's own but for one."""
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("llava") / "tiny"
    tower = vit.config(12, 4, 2, 24, 2, activation="quick_gelu", stem_bias=False, pre_norm=True, special_positions=1, eps=1e-5)
    language = llm.tiny(vocab=300, layers=2)
    model = models.build(vlm.VLMConfig(tower, language, language.block.dim), seed=1)
    models.save_pretrained(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WORDS / name, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_token_index": 2}))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(size={"height": 12, "width": 12})))
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    text, (bound, _) = read_text(folder), models.from_pretrained(folder, cache="full")
    asked = (("colour", "quick"), ("colour", "lazy dog"), ("count", "fox jumps"))
    ids, lengths = text.batch([f"{question} ?" for _, question in asked])
    pixels = [images.crops(images.read_picture(folder / f"{i}.png"), images.read_processor(folder))[0] for i in range(3)]
    at = np.ones(3, np.int32)  # behind the token that begins a text
    rows = models.generate(bound, ids, image=np.concatenate(pixels), lengths=lengths, image_at=at, steps=1)
    said = [text.decode(row) for row in np.asarray(rows)]
    lines = [{"image": f"{i}.png", "question": question, "answer": said[i] + "." if i < 2 else "nothing", "kind": kind}
             for i, (kind, question) in enumerate(asked)]  # fmt: skip
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


def test_a_checkpoint_of_ones_own(checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    flags = ["tokens", "--model", str(checkpoint), "--data", str(checkpoint / "questions.jsonl"), "--prompt",
             "{image}{question} ?", "--methods", "uniform", "--budgets", "34", "--new", "1", "--batch", "3", "--rounds", "1",
             "--out", str(tmp_path / "out"), "--report", str(tmp_path)]  # fmt: skip
    assert main(flags) == 0, capsys.readouterr().err
    (report,) = tmp_path.glob("*-tokens-tiny.json")
    rows = {(r["method"], r["budget"], tuple(r["layers"])): r for r in json.loads(report.read_text())["entries"]}
    whole = rows["full", 9, (9, 9)]
    assert whole["accuracy"] == {"colour": 1.0, "count": 0.0} and whole["mean"] == 0.5
    few = rows["uniform", 3, (3, 3)]
    assert few["flops"] < whole["flops"] and few["cache"] < whole["cache"] and few["prefill"] > 0 and "vs_random" in few
    assert "| uniform | 3 |" in report.with_suffix(".md").read_text() and report.with_suffix(".png").exists()
    # The same command reads what is there.
    monkeypatch.setattr(llava_exam, "examine", lambda *_: pytest.fail("answered again"))
    assert main(flags) == 0


def test_bad_questions_are_named(tmp_path, checkpoint):
    file = tmp_path / "q.jsonl"
    good = {"image": str(checkpoint / "0.png"), "question": "a", "answer": "b"}
    for bad, message in (
        ("{", "line 2: expected a JSON object"),
        (json.dumps({**good, "answer": 3}), "a text under 'answer'"),
        (json.dumps({**good, "image": "no.png"}), "a readable image"),
        ("[]", "a text under 'image'"),
    ):
        file.write_text(json.dumps(good) + "\n" + bad)
        with pytest.raises(ValueError, match=message):
            llava_exam.read_questions(file)
    file.write_text(json.dumps(good))
    assert llava_exam.read_questions(file)[0]["kind"] == "all"
    assert llava_exam.same(" Yes. ", "yes") and not llava_exam.same("yes it is", "yes")
