"""Text encoders and two-tower models compute what transformers computes (tests/models/hub/record.py records it)."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import hub
from models.hub import load
from models.language import encoder
from models.multimodal import dual
from tests.models.hub.test_agreement import GOLDEN, check_logits, forward, recorded
from tests.models.hub.test_files import equal

ENCODERS = ("bert", "bert_masked", "clip_text_model", "siglip_text_model")
DUAL = ("clip_dual", "siglip_dual")


@pytest.mark.parametrize("case", ENCODERS)
def test_text_encoder(case):
    """Rows of texts padded behind, in front and not at all; the pooled row."""
    found = recorded(case)
    bound, config = hub.from_pretrained(GOLDEN / case)
    assert case.startswith(config["model_type"])
    meta = encoder.text_meta(found["tokens"]).replace(valid=found["valid"])
    types = {"types": found["types"]} if "types" in found else {}
    out = forward(encoder, bound, found["tokens"], meta=meta, **types)
    check_logits(np.asarray(out.rows) * found["valid"][..., None], found["rows"])
    assert (out.pooled is None) == ("pooled" not in found)
    if "pooled" in found:
        check_logits(out.pooled, found["pooled"])
    mean = encoder.mean_pool(out.rows, found["valid"])
    np.testing.assert_allclose(mean, found["rows"].sum(1) / found["valid"].sum(1, keepdims=True), atol=2e-4)


@pytest.mark.parametrize("case", DUAL)
def test_two_towers(case):
    """Features and logits of the whole model, and of each tower read alone."""
    found = recorded(case)
    bound, _ = hub.from_pretrained(GOLDEN / case)

    @jax.jit
    def run(arrays, params, image, tokens):
        model = models.Bound(bound.program, arrays, params)
        image, text = dual.image_features(model, image), dual.text_features(model, tokens)
        return image, text, dual.similarity(model, image, text)

    image, text, logits = run(bound.arrays, bound.params, found["image"], found["tokens"])
    check_logits(image, found["image_features"])
    check_logits(text, found["text_features"])
    check_logits(logits, found["logits"])
    for part in ("vision", "text"):
        alone, _ = hub.from_pretrained(GOLDEN / case, part=part)
        assert alone.program.config == getattr(bound.program.config, part)
        assert equal(alone.params, bound.params[part])


def test_old_clip_configs(tmp_path):
    """``text_config_dict`` stands for ``text_config``, as in transformers; a siglip has no such field."""
    shutil.copytree(GOLDEN / "clip_dual", tmp_path / "clip")
    file = tmp_path / "clip" / "config.json"
    config = json.loads(file.read_text())
    old = {**config, "text_config_dict": config["text_config"], "text_config": {"hidden_size": 7}, "vision_config_dict": None}
    file.write_text(json.dumps(old))
    names = load_file(tmp_path / "clip" / "model.safetensors")
    for part in (None, "text"):
        (family, fields), (same, before) = load.family_for(old, part), load.family_for(config, part)
        assert family is same and family.read(fields, names) == family.read(before, names)
    shutil.copytree(GOLDEN / "siglip_dual", tmp_path / "siglip")
    file = tmp_path / "siglip" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text_config_dict": {"hidden_size": 24}}))
    with pytest.raises(ValueError, match="not supported: text_config_dict"):
        hub.from_pretrained(tmp_path / "siglip")


def test_sockets_of_two_towers():
    """A method in the image tower: at full budget the same features."""
    found = recorded("clip_dual")
    bound, _ = hub.from_pretrained(GOLDEN / "clip_dual")
    image = lambda **sockets: dual.image_features(models.bind(bound, **sockets), found["image"])  # noqa: E731
    check_logits(image(reduce={"vision.1": "uniform:keep=9"}), found["image_features"])


def test_text_of_a_larger_model(tmp_path):
    """The language model inside a gemma3, and errors that name the part."""
    config = json.loads((GOLDEN / "gemma3_text" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}}))
    stored = load_file(GOLDEN / "gemma3_text" / "model.safetensors")
    renamed = {k.replace("model.", "model.language_model.", 1): v for k, v in stored.items()}
    save_file(renamed | {"model.vision_tower.x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    text, _ = hub.from_pretrained(tmp_path, part="text")
    whole, _ = hub.from_pretrained(GOLDEN / "gemma3_text")
    assert text.program == whole.program
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), text.params, whole.params)))
    for part, message in ((None, r"part: expected one of \['text'\] of a gemma3, got None"), ("vision", "part: expected")):
        with pytest.raises(ValueError, match=message):
            hub.from_pretrained(tmp_path, part=part)
    with pytest.raises(ValueError, match="part: expected None for a llama"):
        hub.from_pretrained(GOLDEN / "llama", part="text")


@pytest.mark.parametrize(
    "case, fields, message",
    [
        ("bert", dict(position_embedding_type="relative_key"), "position_embedding_type = 'relative_key' is not supported"),
        ("bert", dict(is_decoder=True), "is_decoder = True is not supported"),
        ("bert", dict(type_vocab_size=3), r"token_type_embeddings.weight \[2, 24\], expected \[3, 24\]"),
        ("clip_text_model", dict(eos_token_id=[2, 3]), "eos_token_id: expected one token"),
        ("clip_dual", dict(projection_dim=12), r"of another shape .*text_projection.weight \[16, 24\], expected \[12, 24\]"),
        ("siglip_dual", dict(logit_temperature=3), "not supported: logit_temperature = 3"),
        ("clip_dual", dict(vision_config=dict(hidden_size=24, swirl=1)), "vision_config: fields that are not .*: swirl = 1"),
    ],
)
def test_what_does_not_fit_is_refused(case, fields, message, tmp_path):
    folder = tmp_path / case
    shutil.copytree(GOLDEN / case, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        hub.from_pretrained(folder)


def test_texts_longer_than_the_positions_are_refused():
    bound, _ = hub.from_pretrained(GOLDEN / "bert")
    with pytest.raises(ValueError, match="tokens: expected at most 20"):
        encoder.forward(bound, np.zeros((1, 21), np.int32))
