"""Qwen2.5-VL: a tower for pictures of any size (windows, rotary positions by row and column, blocks of patches merged) in
front of a Qwen2 that turns its channels by time, row and column (M-RoPE). Pictures, no videos."""

from __future__ import annotations

import dataclasses

from jaxattn.core.rope import Rope
from jaxattn.core.types import expect
from jaxattn.nn.block import BlockConfig
from models.hub import language
from models.hub.families import Family
from models.hub.fields import ACTIVATIONS, Fields, short
from models.hub.rules import Rule, dense, norm, under
from models.language import llm
from models.multimodal import vlm
from models.vision import vit

VISION = dict(depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2,
              temporal_patch_size=2, window_size=112, out_hidden_size=3584, fullatt_block_indexes=[7, 15, 23, 31])  # fmt: skip
TEXT = language.BASE | dict(vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
                            num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5,
                            rope_theta=1e6)  # fmt: skip
SECTIONS = (16, 24, 24)
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
OURS = ("vision_config", "text_config", "architectures", "model_type", *TOKENS)


def read_tower(f: Fields) -> vit.ViTConfig:
    dim, heads, patch, merge = (f.size(n) for n in ("hidden_size", "num_heads", "patch_size", "spatial_merge_size"))
    f.only("spatial_patch_size", patch)
    f.only("in_chans", 3)
    f.inert("tokens_per_second", "out_hidden_size")  # of videos; checked against the language model
    head_dim = dim // heads
    rope = dict(f("rope_parameters", {}))
    if rope.pop("rope_type", "axial") != "axial" or rope.keys() - {"rope_theta"} or head_dim % 4:
        raise ValueError(f"{f.where}: rope_parameters = {f('rope_parameters', {})} is not supported with heads of {head_dim} "
                         "channels, expected rope_type 'axial' and multiples of 4")  # fmt: skip
    layers, side = f.size("depth"), f.size("window_size") // merge // patch * merge
    if side < 1:
        raise ValueError(f"{f.where}: window_size: expected at least a block of {merge * patch} pixels, got {f('window_size')}")
    full = tuple(sorted({i for i in f("fullatt_block_indexes") if 0 <= i < layers}))
    mixed = len(full) < layers
    block = BlockConfig(
        dim, heads, heads, head_dim, f.size("intermediate_size"), eps=1e-6, activation=f.activation("hidden_act", "silu"),
        qkv_bias=True, out_bias=True, mlp_bias=True, causal=False, window="window" if mixed else None,
        rope=Rope(head_dim, rope.get("rope_theta", 10000.0), sections=(head_dim // 4,) * 2), full_layers=full if mixed else (),
    )  # fmt: skip
    return vit.ViTConfig((0, 0), f.size("in_channels", 3), patch, layers, block, stem_bias=False, cls=False, post_norm=False,
                         frames=f.size("temporal_patch_size"), positions=False, merge=merge, window=side)  # fmt: skip


def read_text(raw: dict, where: str, tie: bool, names) -> llm.LLMConfig:
    f = Fields(dict(raw), where, TEXT)
    rope = dict(f.raw.get("rope_parameters") or f.raw.get("rope_scaling") or {})
    sections = tuple(rope.pop("mrope_section", SECTIONS))
    rope = {k: "default" if v == "mrope" else v for k, v in rope.items()}
    f.raw |= dict(rope_parameters=rope or None, rope_scaling=None)
    if tie:
        f.raw["tie_word_embeddings"] = True
    f.only("use_sliding_window", False)
    f.inert(*TOKENS)
    c = language.read_qwen2(f, names)
    f.close()
    if sum(sections) * 2 != c.block.head_dim:
        raise ValueError(f"{where}: mrope_section: expected numbers that sum to {c.block.head_dim // 2}, got {list(sections)}")
    turn = dataclasses.replace(c.block.rope, sections=sections, spectrum="shared")
    return dataclasses.replace(c, block=dataclasses.replace(c.block, rope=turn))


def read(f: Fields, names) -> vlm.VLMConfig:
    f.inert(*TOKENS)
    v = f.part("vision_config", VISION)
    v.inert("model_type")
    tower = read_tower(v)
    v.close()
    nested, tie = f("text_config", None), bool(f("tie_word_embeddings", False))
    if nested is None:  # before transformers 4.52 the language model's fields stood beside the tower's
        nested = {k: x for k, x in f.raw.items() if k not in OURS}
        f.inert(*nested)
    else:  # some versions wrote both
        f.inert(*(k for k, x in nested.items() if f.raw.get(k) == x), "sliding_window", "max_window_layers")
    text = read_text(nested, f"{f.where}: text_config", tie, names)
    if (out := v("out_hidden_size")) != text.block.dim:
        raise ValueError(f"{v.where}: out_hidden_size: expected the language model's {text.block.dim}, got {out}")
    wide = tower.block.dim * tower.merge**2
    return vlm.VLMConfig(tower, text, wide, select=-1, projector_norm=True)


def write(c: vlm.VLMConfig, family: str) -> dict:
    """config.json of a Qwen2.5-VL."""
    b, t = c.vision.block, c.llm.block
    flat = dataclasses.replace(c.llm, block=dataclasses.replace(t, rope=dataclasses.replace(t.rope, sections=())))
    text = {k: x for k, x in language.write(flat, "qwen2").items() if k != "architectures"}
    scaling = text.pop("rope_scaling", {"rope_type": "default"})
    text |= dict(model_type="qwen2_5_vl_text", rope_scaling={**scaling, "mrope_section": list(t.rope.sections)})
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    full = list(b.full_layers) if b.window else list(range(c.vision.layers))
    tower = dict(model_type="qwen2_5_vl_vision", depth=c.vision.layers, hidden_size=b.dim, num_heads=b.heads,
                 intermediate_size=b.hidden, hidden_act=names[b.activation], in_channels=c.vision.channels,
                 patch_size=c.vision.patch, spatial_merge_size=c.vision.merge, temporal_patch_size=c.vision.frames,
                 window_size=c.vision.window * c.vision.patch, out_hidden_size=t.dim, fullatt_block_indexes=full,
                 rope_parameters=dict(rope_type="axial", rope_theta=short(b.rope.base)))  # fmt: skip
    return dict(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type=family, text_config=text, vision_config=tower,
                tie_word_embeddings=c.llm.tie)  # fmt: skip


def fits(c: vlm.VLMConfig) -> bool:
    """Whether a configuration is a Qwen2.5-VL's."""
    return not c.vision.positions and c.llm.block.rope is not None and len(c.llm.block.rope.sections) == 3


def table(c: vlm.VLMConfig) -> list[Rule]:
    expect("config", c, "the features of a Qwen2.5-VL", fits(c))
    v, at, layers = c.vision, "visual.blocks.{i}.", "vision/layers/"
    dim = v.block.dim
    stem = (dim, v.channels, v.frames, v.patch, v.patch)
    rules = [Rule("visual.patch_embed.proj.weight", "vision/patch/kernel", "conv", stem), *norm(f"{at}norm1", f"{layers}norm1"),
             *norm(f"{at}norm2", f"{layers}norm2")]  # fmt: skip
    for i, ours in enumerate("qkv"):
        part = (i * dim, (i + 1) * dim)
        rules += [Rule(f"{at}attn.qkv.weight", f"{layers}attn/{ours}/kernel", "transpose", (3 * dim, dim), part),
                  Rule(f"{at}attn.qkv.bias", f"{layers}attn/{ours}/bias", "same", (3 * dim,), part)]  # fmt: skip
    rules += dense(f"{at}attn.proj", f"{layers}attn/o", True)
    for ours in ("gate", "up", "down"):
        rules += dense(f"{at}mlp.{ours}_proj", f"{layers}mlp/{ours}", True)
    rules += norm("visual.merger.ln_q", "projector/norm")
    rules += dense("visual.merger.mlp.0", "projector/up", True) + dense("visual.merger.mlp.2", "projector/down", True)
    return rules + under(language.table(c.llm), "", "llm/")


ALIASES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
FAMILY = Family("qwen2_5_vl", read, write, table, vlm, dict(image_token_id=151655), ALIASES,
                unused=lambda c: language.unused(c.llm))  # fmt: skip
