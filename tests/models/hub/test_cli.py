"""`python -m models.generate`: text, numbers and errors of the command line."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
from models.hub import cli
from models.hub.text import read_text
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

ROOT = Path(__file__).parents[3]
WORDS = ROOT / "tests" / "golden" / "hf" / "words"


def checkpoint(folder, model, **fields):
    """A saved model with the recorded tokenizer beside it."""
    models.save_pretrained(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(WORDS / name, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "text"
    checkpoint(folder, models.build(llm.tiny(vocab=300), seed=1))
    return folder


def test_methods_side_by_side(text_model):
    """What is printed is what ``generate`` gives; a cache of everything changes nothing, a small one is smaller."""
    pytest.importorskip("jinja2")
    out = io.StringIO()
    argv = [str(text_model), "--prompt", "The quick brown fox jumps", "--chat", "--steps", "6"]
    runs = cli.main([*argv, "--cache", "streamingllm:start=2,recent=4", "--steering", "zerotuning:gamma=1.0"], out)
    words = read_text(text_model)
    ids = words.batch([words.chat([dict(role="user", content="The quick brown fox jumps")])], special=False)[0]
    bound, _ = models.from_pretrained(text_model, cache="full")
    expected = np.asarray(models.generate(bound, ids, steps=6))[0].tolist()
    assert runs[0].ids == expected[: len(runs[0].ids)] and len(runs[0].ids) == 6
    labels = ["without methods", "cache streamingllm:start=2,recent=4", "steering zerotuning:gamma=1.0", "all together"]
    assert [r.label for r in runs] == labels and runs[2].ids == runs[0].ids and runs[3].ids == runs[1].ids
    assert 0 < runs[1].cache < runs[0].cache and min(r.first for r in runs) > 0
    printed = out.getvalue()
    assert words.decode(expected).rstrip("\ufffd") in printed and "6 of 6" in printed and "same tokens" in printed


def test_a_picture_and_a_token_method(tmp_path):
    """A vision-language model reads the picture where the prompt has it; keeping every patch changes nothing."""
    Image = pytest.importorskip("PIL.Image")
    tower = vit.config(12, 4, 2, 24, 2, activation="quick_gelu", stem_bias=False, pre_norm=True, special_positions=1, eps=1e-5)
    language = llm.tiny(vocab=300)
    checkpoint(tmp_path, models.build(vlm.VLMConfig(tower, language, language.block.dim)), image_token_index=2)
    fields = dict(size={"height": 12, "width": 12})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(tmp_path / "x.png")
    argv = [str(tmp_path), "--prompt", "quick <|start|> fox", "--image", str(tmp_path / "x.png"), "--steps", "3"]
    runs = cli.main([*argv, "--tokens", "hiprune:keep=9"], io.StringIO())
    assert [len(r.ids) for r in runs] == [3, 3] and runs[0].ids == runs[1].ids


@pytest.mark.parametrize(
    "more, message",
    [
        (["--cache", "h2o:size=3"], "unknown argument 'size'"),
        (["--cache", "h3o"], "h3o"),
        (["--image", "x.png"], "--image: expected none for a llama"),
        (["--steps", "0"], "--steps: expected at least 1"),
    ],
)
def test_what_is_refused(text_model, more, message, capsys):
    with pytest.raises(SystemExit):
        cli.main([str(text_model), "--prompt", "fox", *more])
    assert message in capsys.readouterr().err


def test_the_module_runs():
    run = subprocess.run([sys.executable, "-m", "models.generate", "nowhere", "--prompt", "x"], cwd=ROOT, text=True,
                         capture_output=True)  # fmt: skip
    assert run.returncode == 2 and "expected tokenizer.json in nowhere" in run.stderr
    assert "Warning" not in run.stderr and callable(models.generate)
