"""Vision tower families: vit, deit, CLIP, SigLIP, DINOv2 with and without registers."""

from __future__ import annotations

import dataclasses

from models.hub.families import Family
from models.hub.fields import ACTIVATIONS, Fields, short
from models.hub.rules import Rule, dense, norm
from models.vision import vit

VIT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, layer_norm_eps=1e-12,
           image_size=224, patch_size=16, num_channels=3)  # fmt: skip
CLIP = VIT | dict(layer_norm_eps=1e-5, patch_size=32)
SIGLIP = VIT | dict(layer_norm_eps=1e-6)
DINO = {k: v for k, v in VIT.items() if k != "intermediate_size"} | dict(layer_norm_eps=1e-6, patch_size=14)


def _square(f: Fields, name: str) -> tuple[int, int]:
    value = f(name)
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ValueError(f"{f.where}: {name}: expected one or two positive integers, got {value!r}")
    return sides


def _read(f: Fields, hidden: int, activation: str, **vit_fields) -> vit.ViTConfig:
    image, patch = _square(f, "image_size"), _square(f, "patch_size")
    if patch[0] != patch[1]:
        raise ValueError(f"{f.where}: patch_size = {patch} is not supported, expected square patches")
    return vit.config(image, patch[0], f.size("num_hidden_layers"), f.size("hidden_size"), f.size("num_attention_heads"),
                      channels=f.size("num_channels"), hidden=hidden, activation=f.activation("hidden_act", activation),
                      eps=f("layer_norm_eps"), crop=any(s % patch[0] for s in image), **vit_fields)  # fmt: skip


def _classes(f: Fields, names, keys: tuple[str, ...]) -> int:
    """Outputs of the classifier where one is stored; transformers counts id2label and assumes two labels."""
    f.only("pooler_act", "tanh")
    f.only("pooler_output_size", f("hidden_size"))
    f.inert("encoder_stride")  # of the pre-training head
    return len(f("id2label", None) or range(f("num_labels", 2))) if any(k in names for k in keys) else 0


def _with_bias(c: vit.ViTConfig, f: Fields) -> vit.ViTConfig:
    return dataclasses.replace(c, block=dataclasses.replace(c.block, qkv_bias=bool(f("qkv_bias", True))))


def _pool(names, classes: int) -> str:
    """The pooler of a checkpoint without a classifier (beside one nothing reads it)."""
    return "tanh" if "pooler.dense.weight" in names and not classes else ""


def read_vit(f: Fields, names) -> vit.ViTConfig:
    classes = _classes(f, names, ("classifier.weight",))
    c = _read(f, f.size("intermediate_size"), "gelu", special_positions=1, classes=classes, pool=_pool(names, classes))
    return _with_bias(c, f)


def read_deit(f: Fields, names) -> vit.ViTConfig:
    distilled = "distillation_classifier.weight" in names
    classes = _classes(f, names, ("classifier.weight",))
    c = _read(f, f.size("intermediate_size"), "gelu", registers=1, special_positions=2, classes=classes, distilled=distilled,
              pool=_pool(names, classes))  # fmt: skip
    return _with_bias(c, f)


def read_clip(f: Fields, names) -> vit.ViTConfig:
    f.inert("projection_dim", "vocab_size")
    return _read(f, f.size("intermediate_size"), "quick_gelu", stem_bias=False, pre_norm=True, special_positions=1)


def read_siglip(f: Fields, names) -> vit.ViTConfig:
    f.inert("projection_dim", "vocab_size")
    head = bool(f("vision_use_head", True)) and any(n.startswith("head.") for n in names)
    return _read(f, f.size("intermediate_size"), "gelu_pytorch_tanh", cls=False, pool="probe" if head else "")


def read_dinov2(f: Fields, names) -> vit.ViTConfig:
    gated = bool(f("use_swiglu_ffn", False))
    f.inert("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names", "use_mask_token")
    classes = _classes(f, names, ("classifier.weight",))
    registers = f("num_register_tokens", 4) if f("model_type", "dinov2") == "dinov2_with_registers" else 0
    hidden = f.size("mlp_ratio", 4) * f.size("hidden_size")
    c = _read(f, _swiglu(hidden) if gated else hidden, "gelu", registers=registers, special_positions=1,
              layer_scale=True, classes=classes, pool="cls_mean" if classes else "")  # fmt: skip
    if gated:  # whatever hidden_act says
        c = dataclasses.replace(c, block=dataclasses.replace(c.block, gated=True, activation="silu"))
    return _with_bias(c, f)


def _swiglu(hidden: int) -> int:
    """Width of DINOv2's gated feed-forward: two thirds, in steps of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def write(c: vit.ViTConfig, family: str) -> dict:
    """config.json of a tower."""
    b = c.block
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    architecture = {"vit": "ViT", "deit": "DeiT", "clip_vision_model": "CLIPVision", "siglip_vision_model": "SiglipVision",
                    "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[family]  # fmt: skip
    kind = "Model" if not c.classes else "ForImageClassificationWithTeacher" if c.distilled else "ForImageClassification"
    image = c.image[0] if c.image[0] == c.image[1] else list(c.image)
    found = dict(architectures=[architecture + kind], model_type=family, hidden_size=b.dim, num_hidden_layers=c.layers,
                 num_attention_heads=b.heads, hidden_act=names[b.activation], layer_norm_eps=short(b.eps), image_size=image,
                 patch_size=c.patch, num_channels=c.channels)  # fmt: skip
    if family.startswith("dinov2"):
        widths = {(_swiglu(r * b.dim) if b.gated else r * b.dim): r for r in range(16, 0, -1)}
        if b.hidden not in widths:
            raise ValueError(f"config: expected a feed-forward of a DINOv2, one of {sorted(widths)} wide, got {b.hidden}")
        found |= dict(mlp_ratio=widths[b.hidden], use_swiglu_ffn=b.gated)
        found |= dict(hidden_act="gelu") if b.gated else {}
        found |= dict(num_register_tokens=c.registers) if family.endswith("registers") else {}
    else:
        found |= dict(intermediate_size=b.hidden)
    if family == "siglip_vision_model":
        found |= dict(vision_use_head=c.pool == "probe")
    if family in ("vit", "deit", "dinov2", "dinov2_with_registers"):
        found |= dict(qkv_bias=b.qkv_bias)
    if c.classes:
        found |= dict(id2label={str(i): f"LABEL_{i}" for i in range(c.classes)},
                      label2id={f"LABEL_{i}": i for i in range(c.classes)})  # fmt: skip
    return found


def family_of(c: vit.ViTConfig) -> str:
    """The family that has a configuration's features, else ValueError."""
    b = c.block
    plain = b.norm == "layer" and b.rope is None and c.stem in (0, c.patch) and not c.stem_hidden
    plain = plain and (not b.gated or b.layer_scale)
    if plain and c.post_norm and b.out_bias and b.mlp_bias and not b.qk_norm:
        if not c.cls and not c.registers:
            return "siglip_vision_model"
        if c.pre_norm and not c.stem_bias and not c.registers:
            return "clip_vision_model"
        if b.layer_scale and c.special_positions == 1:
            return "dinov2_with_registers" if c.registers else "dinov2"
        if not b.layer_scale and c.special_positions == c.special <= 2:
            return "deit" if c.registers else "vit"
    raise ValueError(f"config: expected the features of one of vit, deit, CLIP, SigLIP, DINOv2, got {c}")


def _patch(c: vit.ViTConfig, name: str) -> list[Rule]:
    weight = Rule(f"{name}.weight", "patch/kernel", "conv", (c.block.dim, c.channels, c.patch, c.patch))
    return [weight, Rule(f"{name}.bias", "patch/bias")] if c.stem_bias else [weight]


def _positions(c: vit.ViTConfig, name: str, batched: bool) -> list[Rule]:
    """One table for the special rows that have positions and the patches behind them."""
    n = c.special_positions
    shape = ((1,) if batched else ()) + (n + c.patches, c.block.dim)
    patches = Rule(name, "pos", "rows", shape, (n, n + c.patches))
    return [Rule(name, "special_pos", "rows", shape, (0, n)), patches] if n else [patches]


def layer_rules(c, at: str, names: dict[str, str]) -> list[Rule]:
    """Layers of a tower (or a text encoder, whose config has a ``block`` too) under the family's ``names``."""
    b = c.block
    rules = norm(at + names["norm1"], "layers/norm1", True) + norm(at + names["norm2"], "layers/norm2", True)
    for ours in "qkv":
        rules += dense(at + names[ours], f"layers/attn/{ours}", b.qkv_bias)
    rules += dense(at + names["o"], "layers/attn/o", b.out_bias)
    if b.gated:  # one stored tensor for gate and up
        for ours, part in (("gate", (0, b.hidden)), ("up", (b.hidden, 2 * b.hidden))):
            rules += [Rule(f"{at}mlp.weights_in.weight", f"layers/mlp/{ours}/kernel", "transpose", (2 * b.hidden, b.dim), part),
                      Rule(f"{at}mlp.weights_in.bias", f"layers/mlp/{ours}/bias", "same", (2 * b.hidden,), part)]  # fmt: skip
        return rules + dense(f"{at}mlp.weights_out", "layers/mlp/down", True)
    return rules + dense(at + names["up"], "layers/mlp/up", True) + dense(at + names["down"], "layers/mlp/down", True)


BERT_LIKE = dict(norm1="layernorm_before", norm2="layernorm_after", q="attention.attention.query", k="attention.attention.key",
                 v="attention.attention.value", o="attention.output.dense", up="intermediate.dense",
                 down="output.dense")  # fmt: skip
CLIP_LIKE = dict(norm1="layer_norm1", norm2="layer_norm2", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
                 o="self_attn.out_proj", up="mlp.fc1", down="mlp.fc2")  # fmt: skip
DINO_LIKE = BERT_LIKE | dict(norm1="norm1", norm2="norm2", up="mlp.fc1", down="mlp.fc2")


def _special(c: vit.ViTConfig, *names: str) -> list[Rule]:
    """[1, n, C] tensors that follow each other in our special rows."""
    counts = (1, c.registers)
    starts = (0, 1)
    return [Rule(name, "special", "rows", (1, n, c.block.dim), rows=(a, a + n))
            for name, n, a in zip(names, counts, starts, strict=False) if n]  # fmt: skip


def _bert_like(c: vit.ViTConfig, names: dict, special: tuple[str, ...]) -> list[Rule]:
    rules = [*_special(c, *(f"embeddings.{s}" for s in special)), *_patch(c, "embeddings.patch_embeddings.projection"),
             *_positions(c, "embeddings.position_embeddings", True), *layer_rules(c, "encoder.layer.{i}.", names),
             *norm("layernorm", "norm", True)]  # fmt: skip
    if c.pool == "tanh":
        rules += dense("pooler.dense", "pooler", True)
    if c.block.layer_scale:
        rules += [Rule(f"encoder.layer.{{i}}.layer_scale{n}.lambda1", f"layers/scale{n}/scale") for n in (1, 2)]
    return rules


def table_vit(c: vit.ViTConfig) -> list[Rule]:
    rules = _bert_like(c, BERT_LIKE, ("cls_token",))
    return rules + dense("classifier", "classifier", True) if c.classes else rules


def table_deit(c: vit.ViTConfig) -> list[Rule]:
    rules = _bert_like(c, BERT_LIKE, ("cls_token", "distillation_token"))
    if c.distilled:
        rules += dense("distillation_classifier", "distilled", True)
    return rules + dense("classifier", "classifier", True) if c.classes else rules


def table_dinov2(c: vit.ViTConfig) -> list[Rule]:
    rules = _bert_like(c, DINO_LIKE, ("cls_token", "register_tokens"))
    return rules + dense("classifier", "classifier", True) if c.classes else rules


def table_clip(c: vit.ViTConfig) -> list[Rule]:
    return [Rule("embeddings.class_embedding", "special", "rows", (c.block.dim,)), *_patch(c, "embeddings.patch_embedding"),
            *_positions(c, "embeddings.position_embedding.weight", False), *norm("pre_layrnorm", "pre_norm", True),
            *layer_rules(c, "encoder.layers.{i}.", CLIP_LIKE), *norm("post_layernorm", "norm", True)]  # fmt: skip


def table_siglip(c: vit.ViTConfig) -> list[Rule]:
    dim = c.block.dim
    rules = [*_patch(c, "embeddings.patch_embedding"), *_positions(c, "embeddings.position_embedding.weight", False),
             *layer_rules(c, "encoder.layers.{i}.", CLIP_LIKE), *norm("post_layernorm", "norm", True)]  # fmt: skip
    if c.pool != "probe":
        return rules
    rules.append(Rule("head.probe", "probe/query", "rows", (1, 1, dim)))
    for i, ours in enumerate("qkv"):
        part = (i * dim, (i + 1) * dim)
        rules += [Rule("head.attention.in_proj_weight", f"probe/attn/{ours}/kernel", "transpose", (3 * dim, dim), part),
                  Rule("head.attention.in_proj_bias", f"probe/attn/{ours}/bias", "same", (3 * dim,), part)]  # fmt: skip
    rules += dense("head.attention.out_proj", "probe/attn/o", True) + norm("head.layernorm", "probe/norm", True)
    return rules + dense("head.mlp.fc1", "probe/mlp/up", True) + dense("head.mlp.fc2", "probe/mlp/down", True)


def _stored(prefix: str):
    """The body's names carry a prefix where a classifier stands beside it."""

    def name_of(c: vit.ViTConfig, name: str) -> str:
        return name if not c.classes or "classifier" in name.split(".")[0] else prefix + name

    return name_of


def _not_vision(c) -> tuple[str, ...]:
    """What a two-tower checkpoint has besides its vision tower, and position numbers of old versions."""
    return (r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_(scale|bias)$", r"\.position_ids$")


TWO_TOWERS = ((r"^vision_model\.", ""),)
POOLER = (r"^pooler\.dense\.",)
DINO_REST = (r"^embeddings\.mask_token$",)
_family_clip = Family("clip_vision_model", read_clip, write, table_clip, vit, CLIP, TWO_TOWERS, unused=_not_vision)
_family_siglip = Family("siglip_vision_model", read_siglip, write, table_siglip, vit, SIGLIP, TWO_TOWERS, unused=_not_vision,
                        keep=(r"^head\.",))  # fmt: skip
FAMILIES = [
    Family("vit", read_vit, write, table_vit, vit, VIT, ((r"^vit\.", ""),), _stored("vit."), keep=POOLER),
    Family("deit", read_deit, write, table_deit, vit, VIT, ((r"^deit\.", ""), (r"^cls_classifier", "classifier")),
           lambda c, name: _stored("deit.")(c, "cls_" + name if c.distilled and name.startswith("classifier") else name),
           keep=POOLER),
    _family_clip,
    _family_siglip,
    Family("dinov2", read_dinov2, write, table_dinov2, vit, DINO, ((r"^dinov2\.", ""),), _stored("dinov2."), keep=DINO_REST),
    Family("dinov2_with_registers", read_dinov2, write, table_dinov2, vit, DINO | dict(patch_size=16),
           ((r"^dinov2_with_registers\.", ""),), _stored("dinov2_with_registers."), keep=DINO_REST),
]  # fmt: skip
