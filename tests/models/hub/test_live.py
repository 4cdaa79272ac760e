"""Against transformers itself, where torch and transformers are installed: what we save, it loads, and both agree."""

import json

import numpy as np
import pytest

import models
from models.language import llm
from models.vision import vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_transformers_loads_what_we_save(tmp_path):
    """Fresh models of ours, in shards: the same logits and rows there."""
    c = llm.config(50, 2, 32, 4, kv_heads=2, head_dim=12, hidden=48, tie=False, qk_norm=True)
    ours = models.build(c, seed=3)
    models.save_pretrained(ours, tmp_path / "text", shard_bytes=30_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(report.values()), report
    tokens = np.random.default_rng(0).integers(0, 50, (2, 11))
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(llm.forward(ours, tokens).logits, expected, atol=2e-4)

    tower = models.build(vit.config(16, 4, 2, 24, 2, eps=1e-6, registers=2, special_positions=1, layer_scale=True), seed=1)
    models.save_pretrained(tower, tmp_path / "tower")
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not report["unexpected_keys"] and set(report["missing_keys"]) <= {"embeddings.mask_token"}, report
    image = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(pixel_values=torch.tensor(image.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    np.testing.assert_allclose(vit.forward(tower, image).streams.x, expected, atol=2e-4)
    assert json.loads((tmp_path / "tower" / "config.json").read_text())["model_type"] == "dinov2_with_registers"
