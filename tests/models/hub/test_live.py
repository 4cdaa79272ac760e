"""Against transformers itself, where torch and transformers are installed: what we save, it loads, and both agree."""

import json

import numpy as np
import pytest

import models
from jaxattn.nn.block import BlockConfig
from models.hub import images
from models.language import encoder, llm
from models.multimodal import dual, vlm
from models.vision import vit
from tests.models.hub.test_agreement import GOLDEN, recorded

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


@pytest.mark.parametrize("case", ("llava_next", "qwen2_5_vl"))
def test_transformers_sees_what_our_vision_language_models_see(case, tmp_path):
    """Fresh weights and a config.json of ours: the same logits behind a picture there."""
    found = recorded(case)
    bound, raw = models.from_pretrained(GOLDEN / case)
    ours = models.build(bound.program.config, seed=3)
    token = {k: v for k, v in raw.items() if k in ("image_token_index", "image_token_id", "model_type")}
    models.save_pretrained(ours, tmp_path, token)
    assert json.loads((tmp_path / "config.json").read_text()).keys() != raw.keys()
    theirs, report = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    crops, size = images.crops(found["picture.0.0"], images.read_processor(GOLDEN / case))
    tokens, mark = found["tokens"][:1, : found["lengths"][0]], token.get("image_token_index", token.get("image_token_id"))
    given = dict(input_ids=torch.tensor(tokens).long())
    if case == "llava_next":
        given |= dict(pixel_values=torch.tensor(crops.transpose(0, 3, 1, 2)[None]), image_sizes=torch.tensor([size]))
    else:
        patches = crops[0].reshape(-1, 4, 4, 3).transpose(0, 3, 1, 2)
        still = np.repeat(patches[:, :, None], ours.program.config.vision.frames, 2).reshape(len(patches), -1)
        given |= dict(pixel_values=torch.tensor(still), image_grid_thw=torch.tensor([[1, size[0] // 4, size[1] // 4]]),
                      mm_token_type_ids=torch.tensor(tokens == mark).int())  # fmt: skip
    with torch.no_grad():
        expected = theirs.eval()(**given).logits[0].numpy()
    words, _, many = models.hub.place_pictures(ours.program.config, tokens, mark, [[(crops, size)]])
    logits = vlm.forward(ours, many, words)[0].logits[0]
    np.testing.assert_allclose(logits, expected[tokens[0] != mark], atol=2e-4)


def test_transformers_loads_other_families(tmp_path):
    """A Gemma with two rotary embeddings, a Phi with longrope, a text encoder and a two-tower model of ours."""
    rope = llm.Rope(12, 1e6, scaling=dict(rope_type="linear", factor=4.0))
    gemma = llm.config(50, 3, 32, 4, kv_heads=2, head_dim=12, hidden=48, tie=True, qk_norm=True, order="both", unit_offset=True,
                       scale=0.25, window=4, full_layers=(1,), rope=rope, local_rope=llm.Rope(12), activation="gelu_tanh",
                       embed_scale=32**0.5, logit_cap=20.0, length=64)  # fmt: skip
    long = dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=8, short_factor=[1.0, 2.0],
                long_factor=[2.0, 5.0])  # fmt: skip
    phi = llm.config(50, 2, 32, 4, kv_heads=2, hidden=48, tie=False, rope=llm.Rope(4, scaling=long), length=32)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 11))
    for name, c in (("gemma3_text", gemma), ("phi3", phi)):
        ours = models.build(c, seed=3)
        models.save_pretrained(ours, tmp_path / name, dict(model_type=name, pad_token_id=0, eos_token_id=1, bos_token_id=2))
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            expected = theirs.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(llm.forward(ours, tokens).logits, expected, atol=2e-4)

    block = dict(norm="layer", activation="gelu", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, eps=1e-6)
    bert = encoder.EncoderConfig(50, 2, BlockConfig(32, 4, 4, 8, 48, causal=False, order="post", **block), 16, types=2,
                                 embed_norm=True, final_norm=False, pool="cls")  # fmt: skip
    ours = models.build(bert, seed=1)
    models.save_pretrained(ours, tmp_path / "bert")
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "bert", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(tokens)).pooler_output.numpy()
    np.testing.assert_allclose(encoder.forward(ours, tokens).pooled, expected, atol=2e-4)

    text = encoder.EncoderConfig(50, 2, BlockConfig(32, 4, 4, 8, 48, causal=True, **block), 16, pool="eos", eos=7, out=20)
    image = vit.config(12, 4, 2, 24, 2, stem_bias=False, pre_norm=True, special_positions=1)
    ours = models.build(dual.DualConfig(image, text, out=20), seed=1)
    models.save_pretrained(ours, tmp_path / "clip", dict(model_type="clip"))
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert not any(report.values()), report
    tokens[:, -1] = 7
    picture = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(picture.transpose(0, 3, 1, 2)))
    found = dual.similarity(ours, dual.image_features(ours, picture), dual.text_features(ours, tokens))
    np.testing.assert_allclose(found, expected.logits_per_image.numpy(), atol=2e-4)
