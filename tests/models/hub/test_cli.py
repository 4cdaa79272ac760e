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


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """A vision-language model of tiles, and two pictures beside it."""
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("cli") / "vision"
    tower = vit.config(12, 4, 2, 24, 2, activation="quick_gelu", stem_bias=False, pre_norm=True, special_positions=1, eps=1e-5)
    language = llm.tiny(vocab=300)
    model = models.build(vlm.VLMConfig(tower, language, 32, newline=True, pinpoints=((12, 24), (24, 12))), seed=1)
    checkpoint(folder, model, image_token_index=2)
    fields = dict(size={"height": 12, "width": 12}, image_grid_pinpoints=[[12, 24], [24, 12]])
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    for name, shape in (("a.png", (20, 30)), ("b.png", (40, 15, 4)), ("c.png", (9, 33, 3))):  # grey, with transparency, RGB
        Image.fromarray(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)).save(folder / name)
    return folder


def test_pictures_and_methods_at_once(vision_model):
    """Two pictures where the prompt has them; methods alone and together; what is dropped is not cached."""
    argv = [str(vision_model), "--prompt", "quick <|start|> fox <|start|> dog", "--steps", "3",
            "--image", str(vision_model / "a.png"), "--image", str(vision_model / "b.png")]  # fmt: skip
    out = io.StringIO()
    runs = cli.main([*argv, "--tokens", "hiprune:keep=54", "--tokens", "llm.1=uniform:keep=4", "--steering",
                     "zerotuning:gamma=1.0"], out)  # fmt: skip
    plain, steered, whole, cut, every = runs
    assert [r.label for r in runs][3:] == ["tokens llm.1=uniform:keep=4", "all together"]
    assert plain.ids == whole.ids == steered.ids and 1 <= len(plain.ids) <= 3 and cut.ids == every.ids
    assert cut.cache < plain.cache <= whole.cache and every.cache < whole.cache


def test_methods_that_want_one_place():
    ways = {"a": {"cache": "full"}, "b": {"steering": "vhr"}, "c": {"steering": "var"}, "d": {"reduce": {"vision": "x"}}}
    assert cli.together(ways) == {"cache": "full", "steering": ("vhr", "var"), "reduce": {"vision": "x"}}
    for rival in ({"cache": "h2o"}, {"reduce": {"vision": "y"}}):
        assert cli.together({**ways, "e": rival}) is None
    assert cli.together({**ways, "e": {"reduce": {"llm.1": "y"}}})["reduce"] == {"vision": "x", "llm.1": "y"}


@pytest.mark.parametrize(
    "more, code, message",
    [
        ([], 2, "--image: expected a picture for a llava_next"),
        (["--image", "a.png", "--image", "b.png", "--prompt", "<|start|>"], 2, "2 <|start|>, one for each --image, got 1"),
        (["--image", "a.png", "--prompt", "fox <|start|>"], 2, "expected text behind the last picture"),
        (["--image", "nothing.png"], 2, "nothing.png"),
        (["--image", "config.json"], 2, "image: expected a picture, got"),
        (["--image", "a.png", "--tokens", "vision.9=uniform:keep=3"], 2, "reduce[vision.9]"),
        (["--image", "a.png", "--tokens", "uniform:keep=many"], 2, "argument 'keep': expected int, got 'many'"),
        (["--image", "a.png", "--tokens", "uniform:keep=9999"], 2, "keep: expected at most"),
        (["--image", "a.png", "--steering", "vhr:layers=(0,9)"], 2, "layers: expected numbers in"),
    ],
)
def test_what_is_refused_with_pictures(vision_model, more, code, message, capsys):
    argv = [str(vision_model / x) if x.endswith((".png", ".json")) else x for x in more]
    with pytest.raises(SystemExit) as exit:
        cli.main([str(vision_model), "--prompt", "fox", *argv], io.StringIO())
    error = capsys.readouterr().err
    assert message in error and exit.value.code == code and "Traceback" not in error


def test_a_checkpoint_without_its_processor(vision_model, tmp_path, capsys):
    shutil.copytree(vision_model, tmp_path / "x")
    (tmp_path / "x" / "preprocessor_config.json").unlink()
    with pytest.raises(SystemExit):
        cli.main([str(tmp_path / "x"), "--prompt", "fox", "--image", str(vision_model / "a.png")])
    assert "expected preprocessor_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--cache", "h2o:size=3"], "unknown argument 'size'"),
        (["--cache", "h3o"], "h3o"),
        (["--image", "x.png"], "--image: expected none for a llama"),
        (["--steps", "0"], "--steps: expected at least 1"),
        (["--part", "text"], "part: expected None for a llama"),
        (["--adapter", "nowhere"], "expected adapter_config.json in nowhere"),
        (["--tokens", "hiprune:keep=3"], "expected a vision-language model"),
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
