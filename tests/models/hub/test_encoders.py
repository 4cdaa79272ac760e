"""Text encoders and two-tower models compute what transformers computes (tests/models/hub/record.py records it)."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import hub
from models.language import encoder
from models.multimodal import dual
from models.vision import vit
from tests.models.hub.test_agreement import GOLDEN, check_logits, forward, recorded

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
    alone, _ = hub.from_pretrained(GOLDEN / case, part="text")
    check_logits(encoder.forward(alone, found["tokens"]).pooled, found["text_features"])
    alone, _ = hub.from_pretrained(GOLDEN / case, part="vision")
    pooled = vit.forward(alone, found["image"]).pooled
    check_logits(pooled @ bound.params["projection"]["kernel"] if "projection" in bound.params else pooled, image)


def test_sockets_of_two_towers():
    """Methods in the image tower: at full budget the same features, at less others."""
    found = recorded("clip_dual")
    bound, _ = hub.from_pretrained(GOLDEN / "clip_dual")
    image = lambda **sockets: dual.image_features(models.bind(bound, **sockets), found["image"])  # noqa: E731
    check_logits(image(reduce={"vision.1": "uniform:keep=9"}), found["image_features"])
    assert np.abs(np.asarray(image(reduce={"vision.1": "uniform:keep=3"})) - found["image_features"]).max() > 1e-3


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
