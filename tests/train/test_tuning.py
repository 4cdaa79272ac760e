"""Training from a checkpoint: adapters beside frozen weights, PEFT's layout, merging, resuming, refusals."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import hub, lora
from models.hub import adapters as peft
from models.language import llm
from train import tasks
from train.__main__ import main
from train.checkpoints import load_params
from train.config import LM
from train.progress import read_metrics

WORDS = Path(__file__).parents[1] / "golden" / "hf" / "words"
FLAGS = "--length 32 --batch 8 --mesh.data 1 --lr 0.02 --schedule constant --warmup 1 --log-every 6 --eval-batches 1"
LORA = "rank=4,alpha=8,targets=q+v+down"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "base"
    models.save_pretrained(models.build(llm.tiny(vocab=300, layers=2, tie=False), seed=1), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WORDS / name, folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.py"
    path.write_text("".join(f"def f{n}(x):\n    return x + {n * n}\n" for n in range(300)))
    return path


@pytest.fixture(scope="module")
def run(checkpoint, source, tmp_path_factory):
    """(train(folder, steps, *flags) -> exit status, a run that was resumed, with a merged checkpoint)."""

    def train(out, steps, *flags):
        return main(["lm", "--init", str(checkpoint), "--data", str(source), "--out", str(out), "--steps", str(steps),
                     *FLAGS.split(), *flags])  # fmt: skip

    out = tmp_path_factory.mktemp("run")
    assert train(out, 6, "--lora", LORA) == 0
    assert train(out, 24, "--lora", LORA, "--merge", str(out / "merged")) == 0
    return train, out


def logits(bound, params, tokens):
    run = lambda arrays, params: llm.forward(models.Bound(bound.program, arrays, params), tokens).logits  # noqa: E731
    return np.asarray(jax.jit(run)(bound.arrays, params))


def test_adapters_learn_and_merge(checkpoint, run):
    """The loss falls; adapters alone are trained and saved; merged weights give the logits of the adapters."""
    _, out = run
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [6, 12, 18, 24]  # the second program went on where the first had stopped
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    saved, _ = load_params(out / "checkpoints")
    assert saved.keys() == {"adapters"}
    base, _ = hub.from_pretrained(checkpoint)
    added, found = peft.load_adapter(base, out / "adapter")
    assert (found.rank, found.scale, found.targets) == (4, 2.0, "q+v+down")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), added, saved["adapters"]))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 17))
    beside = logits(base, lora.attach(base.params, added, found), tokens)
    merged, config = hub.from_pretrained(out / "merged")
    np.testing.assert_allclose(logits(merged, merged.params, tokens), beside, atol=1e-5)
    assert np.abs(beside - logits(base, base.params, tokens)).max() > 0.05
    assert config == hub.from_pretrained(checkpoint)[1] and (out / "merged" / "tokenizer.json").is_file()


def test_files_are_pefts(checkpoint, run):
    """Names, shapes and W + (alpha / r) B A, read from the files by hand."""
    _, out = run
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"] and config["bias"] == "none"
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 3
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "merged" / "model.safetensors")
    for name in before:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") not in stored:
            np.testing.assert_array_equal(after[name], before[name])
            continue
        a, b = stored[key.format("A")], stored[key.format("B")]
        assert a.shape == (4, before[name].shape[1]) and b.shape == (before[name].shape[0], 4)
        np.testing.assert_allclose(after[name], before[name] + 2.0 * b @ a, atol=1e-6)


def test_all_of_a_checkpoint_is_tuned(run, tmp_path):
    train, _ = run
    assert train(tmp_path, 2, "--merge", str(tmp_path / "tuned")) == 0
    trained, _ = load_params(tmp_path / "checkpoints")
    tuned, _ = hub.from_pretrained(tmp_path / "tuned")
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), trained, tuned.params))


def test_dropout_is_of_training_only(checkpoint):
    base, _ = hub.from_pretrained(checkpoint)
    kind = lora.parse("rank=2,targets=up,dropout=0.5")
    added = jax.tree.map(lambda x: x + 0.3, lora.init(base.params, kind, jax.random.key(0)))
    tokens = np.arange(12)[None]
    plain = logits(base, lora.merge(base.params, added, kind), tokens)
    np.testing.assert_allclose(logits(base, lora.attach(base.params, added, kind), tokens), plain, atol=1e-4)
    one, two = (logits(base, lora.attach(base.params, added, kind, jax.random.key(s)), tokens) for s in (0, 1))
    assert np.abs(one - plain).max() > 1e-3 and np.abs(one - two).max() > 1e-3


def test_what_is_refused(run, checkpoint, source, tmp_path, capsys):
    train, out = run
    assert train(tmp_path / "refused", 2, "--lora", "range=4") == 1
    assert "unknown argument 'range'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="targets: expected names among q, k, v"):
        lora.parse("targets=q+w")
    few = tmp_path / "few"
    shutil.copytree(checkpoint, few)
    models.save_pretrained(models.build(llm.tiny(vocab=290)), few)
    wrong = {"dim: expected nothing beside a checkpoint": dict(init=checkpoint, dim=32),
             "lora: expected None without a checkpoint": dict(lora="rank=2"),
             "tokenizer: expected at most the 290 tokens of the checkpoint, got 300": dict(init=few)}  # fmt: skip
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=message):
            tasks.build(LM(data=source, length=32, batch=8, out=tmp_path / "refused", **fields))

    base, _ = hub.from_pretrained(checkpoint)
    folder = tmp_path / "adapter"
    shutil.copytree(out / "adapter", folder)
    stored = load_file(folder / "adapter_model.safetensors")
    gone, renamed, longer = sorted(stored)[:3]
    wrong = {k: v for k, v in stored.items() if k != gone} | {"base_model.model.x": stored[gone], longer: stored[longer][:, :1]}
    save_file(wrong, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: .*; 1 unexpected: base_model\.model\.x; 1 of another shape"):
        peft.load_adapter(base, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"\['adapter_model.bin'\]: pickled weights run code"):
        peft.load_adapter(base, folder)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    shutil.copy(out / "adapter" / "adapter_model.safetensors", folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert peft.load_adapter(base, folder)[1].scale == 4.0  # 8 / sqrt(4)
    wrong = {"use_dora = True is not supported": dict(use_dora=True), "bias = 'all'": dict(bias="all"),
             "init_lora_weights = 'pissa'": dict(init_lora_weights="pissa"), "peft_type = 'IA3'": dict(peft_type="IA3"),
             "not supported: magic = 1": dict(magic=1)}  # fmt: skip
    for message, fields in wrong.items():
        (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(ValueError, match=message):
            peft.load_adapter(base, folder)
    phi, _ = hub.from_pretrained(WORDS.parent / "phi3")
    added = lora.init(phi.params, lora.Lora(2, targets="q"), jax.random.key(0))
    with pytest.raises(ValueError, match=r"targets: .*qkv_proj.weight holds several"):
        peft.save_adapter(phi, added, lora.Lora(2, targets="q"), tmp_path / "fused")
    assert jnp.asarray(lora.merge(phi.params, added, lora.Lora(2))["layers"]["attn"]["q"]["kernel"]).shape[0] == 2
