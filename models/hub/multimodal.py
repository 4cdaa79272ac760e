"""Vision-language families: LLaVA 1.5, LLaVA-NeXT (1.6), Qwen2.5-VL, and the places of pictures in their prompts."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from jaxattn.core.types import expect
from models.hub import language, qwen_vl, vision
from models.hub.families import Family
from models.hub.fields import ACTIVATIONS, Fields
from models.hub.rules import Rule, dense, under
from models.multimodal import pictures, vlm

LLAVA = dict(image_token_index=32000)
NEXT = LLAVA | dict(image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
TEXT = {f.name: f for f in language.FAMILIES if f.table is language.table}
VISION = {f.name: f for f in vision.FAMILIES if f.name in ("clip_vision_model", "siglip_vision_model")}
# What LLaVA assumes of a tower whose fields are silent (CLIP ViT-L/14 at 336).
TOWER = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
             patch_size=14)  # fmt: skip
ALIASES = ((r"^model\.(vision_tower|multi_modal_projector|language_model|image_newline)\b", r"\1"),
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
    f.inert("image_token_index", "image_token_id", "image_seq_length")  # of the prompt: see ``place_pictures``
    f.inert("ignore_index", "vocab_size")  # of the loss; the text_config's
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


def read_next(f: Fields, names) -> vlm.VLMConfig:
    f.inert("use_image_newline_parameter")  # transformers always has one
    grid = f("image_grid_pinpoints")
    if not isinstance(grid, list) or not grid or not all(
        isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(s, int) for s in p) for p in grid
    ):
        raise ValueError(f"{f.where}: image_grid_pinpoints: expected a list of [height, width], got {grid!r}")
    c = read_llava(f, names)
    side = c.vision.image[0]
    if c.vision.image[1] != side or any(s < 1 or s % side for p in grid for s in p):
        raise ValueError(f"{f.where}: image_grid_pinpoints = {grid} is not supported, expected multiples of a square tower's "
                         f"image_size, {c.vision.image}")  # fmt: skip
    return dataclasses.replace(c, newline=True, pinpoints=tuple(map(tuple, grid)))


def write(c: vlm.VLMConfig, family: str) -> dict:
    """config.json of LLaVA and LLaVA-NeXT."""
    text = language.write(c.llm, language.family_of(c.llm))
    tower = vision.write(c.vision, vision.family_of(c.vision))
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    name = {"llava": "Llava", "llava_next": "LlavaNext"}[family]
    more = dict(image_grid_pinpoints=[list(p) for p in c.pinpoints]) if family == "llava_next" else {}
    return dict(architectures=[f"{name}ForConditionalGeneration"], model_type=family, text_config=text, vision_config=tower,
                **more, projector_hidden_act=names[c.activation], vision_feature_layer=c.select, tie_word_embeddings=c.llm.tie,
                vision_feature_select_strategy="default" if c.vision.cls else "full", image_seq_length=c.visual)  # fmt: skip


def family_of(c: vlm.VLMConfig) -> str:
    """"llava", "llava_next" or "qwen2_5_vl", if that is what a configuration's parts make, else ValueError."""
    if qwen_vl.fits(c):
        return qwen_vl.FAMILY.name
    language.family_of(c.llm)
    expect("config", vision.family_of(c.vision), f"a tower among {sorted(VISION)}", vision.family_of(c.vision) in VISION)
    plain = not c.projector_norm and not c.position and c.projector_hidden == c.llm.block.dim
    expect("config", c, "a projector of two maps as wide as the language model", plain)
    expect("config", c, "newlines and pinpoints together", c.newline == bool(c.pinpoints))
    return "llava_next" if c.newline else "llava"


def table(c: vlm.VLMConfig) -> list[Rule]:
    tower = VISION[vision.family_of(c.vision)]
    newline = [Rule("image_newline", "newline")] if c.newline else []
    return [*newline, *under(tower.table(c.vision), "vision_tower.", "vision/"),
            *under(language.table(c.llm), "language_model.", "llm/"),
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


def layout(c: vlm.VLMConfig, size: tuple[int, int]) -> pictures.Layout:
    """How a picture of ``size`` (height, width) pixels is laid out in a model's prompt."""
    if not c.vision.positions:
        return pictures.blocks(tuple(s // c.vision.patch for s in size), c.vision.merge, c.vision.window)
    if not c.pinpoints:
        return pictures.whole(c.vision.grid)
    return pictures.tiled(size, c.pinpoints, c.vision.image[0], c.vision.grid)


def place_pictures(c: vlm.VLMConfig, tokens, image_token: int, images, lengths=None):
    """Prompts without their image tokens, and Pictures that know where they belong.

    Args:
      tokens: int [B, T] right-padded; each picture is one ``image_token``, or as many of them as it has rows (as the
        processors of transformers write them).
      images: per prompt, a list of (float [crops, H, W, 3], (height, width) of the picture), as ``images.crops`` gives.
      lengths: int [B] or None.
    Returns: (text tokens int32 [B, T'] right-padded, their lengths int32 [B], Pictures).
    """
    tokens = np.asarray(tokens)
    expect("tokens", f"shape {tokens.shape}", "[batch, tokens]", tokens.ndim == 2)
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    expect("images", f"{len(images)} lists", f"one for each of the {len(tokens)} prompts", len(images) == len(tokens))
    words, places, turns, prompts = [], [], [], []
    for i, (row, n, mine) in enumerate(zip(tokens, lengths, images, strict=True)):
        layouts = [layout(c, size) for _, size in mine]
        text, place, starts = _walk(row[:n].tolist(), image_token, layouts, f"tokens[{i}]")
        words.append(text)
        places.append([at for at, _ in place])
        turns.append([turn for _, turn in place])
        prompts.append([(layout, *start) for layout, start in zip(layouts, starts, strict=True)])
    longest = max(map(len, words))
    padded = np.array([row + [0] * (longest - len(row)) for row in words], np.int32)
    # What is behind a prompt stands behind it: causality hides it even from who gives no lengths.
    onward = lambda rows: np.array([row + [row[-1] + 1 + i for i in range(longest - len(row))] for row in rows])  # noqa: E731
    found = pictures.assemble([[x for x, _ in mine] for mine in images], prompts, onward(places),
                              None if c.vision.positions else onward(turns))  # fmt: skip
    return padded, np.array([len(w) for w in words], np.int32), found


def _walk(row: list[int], image_token: int, layouts: list[pictures.Layout], name: str):
    """(text tokens, their places, place of each picture's first row) of one prompt; a place is (row, rotary position)."""
    marks, rows = row.count(image_token), [x.length for x in layouts]
    expect(name, f"{marks} image tokens", f"{len(rows)}, one for each picture, or {sum(rows)}, one for each of their rows",
           marks in (len(rows), sum(rows)))  # fmt: skip
    expect(name, "an image token" if row else "no token", "text behind the last picture", bool(row) and row[-1] != image_token)
    each, text, place, starts = marks == len(rows), [], [], []
    at = turn = i = 0
    while i < len(row):
        if row[i] != image_token:
            text.append(row[i])
            place.append((at, turn))
            at, turn, i = at + 1, turn + 1, i + 1
            continue
        size, turns = rows[len(starts)], layouts[len(starts)].turns
        expect(name, f"{row[i:i + size].count(image_token)} image tokens in a row", f"the {size} of picture {len(starts)}",
               each or row[i : i + size] == [image_token] * size)  # fmt: skip
        starts.append((at, turn))
        at, turn, i = at + size, turn + (size if turns is None else turns), i + (1 if each else size)
    return text, place, starts


KEEP = (r"^vision_tower\.head\.",)
FAMILIES = [
    Family("llava", read_llava, write, table, vlm, LLAVA, ALIASES, unused=_unused, keep=KEEP),
    Family("llava_next", read_next, write, table, vlm, NEXT, ALIASES, unused=_unused, keep=KEEP),
    qwen_vl.FAMILY,
]
