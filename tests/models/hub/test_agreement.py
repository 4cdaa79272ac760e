"""Loaded checkpoints compute what transformers computes: recorded outputs of tiny models of every family
(tests/models/hub/record.py makes them)."""

from pathlib import Path

import jax
import numpy as np
import pytest

import models
from jaxattn import cache
from jaxattn import tokens as tokens_methods
from models import hub
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

GOLDEN = Path(__file__).parents[2] / "golden" / "hf"
LIMIT = 2e-4  # largest difference of logits and rows
TEXT = ("llama", "llama_bias", "llama_linear", "llama_dynamic", "llama_llama3", "llama_yarn", "mistral", "qwen2",
        "qwen2_window", "qwen2_mixed", "qwen3", "qwen3_bias", "phi3", "phi3_longrope", "gemma2", "gemma2_plain", "gemma3_text",
        "gemma3_text_linear")  # fmt: skip
TOWERS = ("vit", "vit_wide", "deit", "deit_student", "clip", "siglip", "dinov2", "dinov2_swiglu",
          "dinov2_registers")  # fmt: skip
LLAVA = ("llava", "llava_siglip")


def recorded(case):
    with np.load(GOLDEN / case / "io.npz") as arrays:
        return dict(arrays)


def forward(module, bound, *args, **kwargs):
    """A jitted forward pass."""
    run = lambda arrays, params, *a: module.forward(models.Bound(bound.program, arrays, params), *a, **kwargs)  # noqa: E731
    return jax.jit(run)(bound.arrays, bound.params, *args)


def check_greedy(new, found):
    """Equal tokens as long as transformers was sure: behind a near tie the texts may part."""
    for ours, theirs, gap in zip(np.asarray(new), found["greedy"], found["gap"], strict=True):
        sure = int(np.argmax(gap < 1e-3)) if (gap < 1e-3).any() else len(gap)
        assert sure >= 32, "the recording has too early a tie"
        np.testing.assert_array_equal(ours[:sure], theirs[:sure])


def check_logits(ours, theirs):
    difference = np.abs(np.asarray(ours) - theirs).max()
    assert difference <= LIMIT, difference


@pytest.mark.parametrize("case", TEXT)
def test_language_model(case):
    """Logits of padded prompts, and 64 greedy tokens decoded from a cache behind a padded prefill."""
    found = recorded(case)
    bound, config = hub.from_pretrained(GOLDEN / case, cache=cache.full())
    assert case.startswith(config["model_type"])
    tokens, lengths = found["tokens"], found["lengths"]
    live = np.arange(tokens.shape[1]) < lengths[:, None]
    meta = llm.text_meta(tokens).replace(valid=live)
    out = forward(llm, bound, tokens, meta=meta)
    check_logits(np.asarray(out.logits) * live[..., None], found["logits"])
    check_greedy(models.generate(bound, tokens, steps=found["greedy"].shape[1], lengths=lengths), found)


@pytest.mark.parametrize("case", TOWERS)
def test_vision_tower(case):
    """Rows of the last two layers, pooled rows and classes."""
    found = recorded(case)
    bound, _ = hub.from_pretrained(GOLDEN / case)
    layers = bound.program.config.layers
    early = forward(vit, bound, found["image"], layers_to_run=layers - 1)
    out = forward(vit, bound, found["image"])
    check_logits(early.streams.x, found["penultimate"])
    check_logits(out.stack.streams.x, found["last"])
    assert {"logits", "last_hidden_state"} & found.keys()
    if "logits" in found:
        check_logits(out.logits, found["logits"])
    if "last_hidden_state" in found and case != "clip":  # CLIP's is the row before the last norm
        check_logits(out.streams.x, found["last_hidden_state"])
    if "pooler_output" in found:
        check_logits(out.pooled, found["pooler_output"])


@pytest.mark.parametrize("case", ("vit", "deit", "clip", "siglip", "dinov2", "dinov2_registers"))
def test_towers_at_another_size(case):
    """Interpolated positions, for images that are taller, wider and smaller than the checkpoint's."""
    found = recorded(case)
    bound, _ = hub.from_pretrained(GOLDEN / case, image=found["wide_image"].shape[1:3])
    check_logits(forward(vit, bound, found["wide_image"]).stack.streams.x, found["wide_last"])


def test_a_language_model_has_no_image_size():
    with pytest.raises(ValueError, match="image: expected None for a llama"):
        hub.from_pretrained(GOLDEN / "llama", image=(8, 8))


@pytest.mark.parametrize("case", LLAVA)
def test_llava(case):
    """Text rows around an image, and 64 greedy tokens from the cache."""
    found = recorded(case)
    bound, config = hub.from_pretrained(GOLDEN / case, cache=cache.full())
    token = config.get("image_token_index", config.get("image_token_id"))
    tokens, lengths, image_at = hub.place_image(found["tokens"], token, found["lengths"])
    meta = vlm.around_image(bound.program.config, llm.text_meta(tokens), image_at)
    meta = meta.replace(valid=np.arange(tokens.shape[1]) < lengths[:, None])
    out, _ = forward(vlm, bound, found["image"], tokens, meta=meta, image_at=image_at)
    for row, n, ours, theirs in zip(found["tokens"], found["lengths"], out.logits, found["logits"], strict=True):
        text = np.flatnonzero(row[:n] != token)
        check_logits(ours[: len(text)], theirs[text])
    steps = found["greedy"].shape[1]
    new = models.generate(bound, tokens, steps=steps, lengths=lengths, image=found["image"], image_at=image_at)
    check_greedy(new, found)


def test_sockets_of_a_loaded_llava():
    """Methods by name on loaded weights: at full budget the recorded text, at less another model that still runs."""
    found = recorded("llava")
    bound, config = hub.from_pretrained(GOLDEN / "llava", cache=cache.full())
    tokens, lengths, image_at = hub.place_image(found["tokens"], config["image_token_index"], found["lengths"])
    steps = 8

    def generate(**sockets):
        model = models.bind(bound, **{"cache": cache.full(), **sockets})
        return np.asarray(models.generate(model, tokens, steps=steps, lengths=lengths, image=found["image"], image_at=image_at))

    patches = bound.program.config.visual
    whole = generate(reduce={"vision": f"hiprune:keep={patches}"}, cache="streamingllm:start=4,recent=64",
                     steering="zerotuning:gamma=1.0")  # fmt: skip
    np.testing.assert_array_equal(whole, found["greedy"][:, :steps])
    less = generate(reduce={"vision": "hiprune:keep=3"}, cache="streamingllm:start=2,recent=6", steering="zerotuning:gamma=3.0")
    assert less.shape == whole.shape and (less != whole).any()
    dropped = generate(reduce={"llm": tokens_methods.visiondrop_stages(((4, 1),), (1,))})
    assert dropped.shape == whole.shape
