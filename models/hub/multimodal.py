"""Vision-language families: LLaVA 1.5."""

from __future__ import annotations

import re

import numpy as np

from jaxattn.core.types import expect
from models.hub import language, vision
from models.hub.families import Family
from models.hub.fields import ACTIVATIONS, Fields
from models.hub.rules import Rule, dense, under
from models.multimodal import vlm

LLAVA = dict(image_token_index=32000)
TEXT = {f.name: f for f in language.FAMILIES if f.table is language.table}
VISION = {f.name: f for f in vision.FAMILIES if f.name in ("clip_vision_model", "siglip_vision_model")}
# What LLaVA assumes of a tower whose fields are silent (CLIP ViT-L/14 at 336).
TOWER = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
             patch_size=14)  # fmt: skip
ALIASES = ((r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
           (r"^lm_head\.", "language_model.lm_head."),
           (r"^vision_tower\.vision_model\.", "vision_tower."),
           (r"^language_model\.(layers|embed_tokens|norm)\.", r"language_model.model.\1."))  # fmt: skip


def _part(f: Fields, name: str, families: dict, default: str, more: dict) -> tuple[Family, Fields]:
    raw = f(name, None)
    if raw is None:
        raw, f.raw[name] = {}, dict(more)
    kind = raw.get("model_type", default) if isinstance(raw, dict) else None
    if kind not in families:
        raise ValueError(f"{f.where}: {name}: model_type = {kind!r} is not supported, expected one of {sorted(families)}")
    family = families[kind]
    return family, f.part(name, family.defaults)


def read_llava(f: Fields, names) -> vlm.VLMConfig:
    f.inert("image_token_index", "image_token_id", "image_seq_length")  # of the prompt: see ``place_image``
    f.only("multimodal_projector_bias", True)
    strategy = f.only("vision_feature_select_strategy", "default", "full")
    tower, v = _part(f, "vision_config", VISION, "clip_vision_model", TOWER)
    text, t = _part(f, "text_config", TEXT, "llama", {})
    tie = f("tie_word_embeddings", False)
    if tie and not t("tie_word_embeddings", False):
        t.raw["tie_word_embeddings"] = True
    seen = [n.removeprefix("vision_tower.") for n in names if n.startswith("vision_tower.")]
    c_vision, c_text = tower.read(v, seen), text.read(t, names)
    v.close()
    t.close()
    if c_vision.cls != (strategy == "default"):
        raise ValueError(f"{f.where}: vision_feature_select_strategy = {strategy!r} is not supported with {tower.name}: "
                         "the language model reads the patches and nothing else")  # fmt: skip
    select = f("vision_feature_layer", -2)
    if not isinstance(select, int):
        raise ValueError(f"{f.where}: vision_feature_layer = {select!r} is not supported, expected one layer")
    select = select if select < 0 else select - c_vision.layers - 1
    expect("vision_feature_layer", select, f"one of {c_vision.layers + 1} hidden states", -c_vision.layers - 1 <= select < 0)
    return vlm.VLMConfig(c_vision, c_text, c_text.block.dim, select, activation=f.activation("projector_hidden_act", "gelu"))


def write(c: vlm.VLMConfig, family: str) -> dict:
    """config.json of LLaVA."""
    text = language.write(c.llm, language.family_of(c.llm))
    tower = vision.write(c.vision, vision.family_of(c.vision))
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return dict(architectures=["LlavaForConditionalGeneration"], model_type="llava", text_config=text, vision_config=tower,
                projector_hidden_act=names[c.activation], vision_feature_layer=c.select, tie_word_embeddings=c.llm.tie,
                vision_feature_select_strategy="default" if c.vision.cls else "full", image_seq_length=c.visual)  # fmt: skip


def family_of(c: vlm.VLMConfig) -> str:
    """"llava", if that is what a configuration's parts make, else ValueError."""
    language.family_of(c.llm)
    expect("config", vision.family_of(c.vision), f"a tower among {sorted(VISION)}", vision.family_of(c.vision) in VISION)
    plain = not c.projector_norm and not c.position and c.projector_hidden == c.llm.block.dim
    expect("config", c, "a projector of two maps as wide as the language model", plain)
    return "llava"


def table(c: vlm.VLMConfig) -> list[Rule]:
    tower = VISION[vision.family_of(c.vision)]
    return [*under(tower.table(c.vision), "vision_tower.", "vision/"), *under(language.table(c.llm), "language_model.", "llm/"),
            *dense("multi_modal_projector.linear_1", "projector/up", True),
            *dense("multi_modal_projector.linear_2", "projector/down", True)]  # fmt: skip


def _unused(c: vlm.VLMConfig) -> tuple[str, ...]:
    tower = VISION[vision.family_of(c.vision)]
    patterns = (*language.unused(c.llm), *tower.unused(c.vision))
    return tuple(re.sub(r"^\^", r"^(vision_tower|language_model)\\.", p) for p in patterns)


def place_image(tokens, image_token: int, lengths=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts as LLaVA's processor makes them, without their image tokens.

    Args: tokens: int [B, T] right-padded, one run of ``image_token`` per row (of any length).  lengths: int [B] or None.
    Returns: (text tokens int32 [B, T'] right-padded, their lengths int32 [B], image_at int32 [B]: text rows before the image).
    """
    tokens = np.asarray(tokens)
    expect("tokens", f"shape {tokens.shape}", "[batch, tokens]", tokens.ndim == 2)
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    rows, at = [], []
    for i, (row, n) in enumerate(zip(tokens, lengths, strict=True)):
        (here,) = np.nonzero(row[:n] == image_token)
        expect(f"tokens[{i}]", f"image tokens at {here.tolist()}", "one run of image tokens",
               len(here) > 0 and here[-1] - here[0] + 1 == len(here))  # fmt: skip
        rows.append(np.delete(row[:n], here))
        at.append(here[0])
    text = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        text[i, : len(row)] = row
    return text, np.array([len(r) for r in rows], np.int32), np.array(at, np.int32)


FAMILIES = [Family("llava", read_llava, write, table, vlm, LLAVA, ALIASES, unused=_unused, keep=(r"^vision_tower\.head\.",))]
