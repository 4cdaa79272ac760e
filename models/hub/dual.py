"""Two-tower families: clip and siglip, whole; ``PARTS`` says which of their towers can be read alone."""

from __future__ import annotations

from models.hub import encoders, language, vision
from models.hub.families import Family
from models.hub.fields import Fields
from models.hub.rules import Rule, dense, under
from models.multimodal import dual

TEXT = {f.name: f for f in encoders.FAMILIES}
VISION = {f.name: f for f in vision.FAMILIES}


def part_of(raw: dict, field: str) -> dict:
    """The field of a config.json that describes one part; in a clip, ``<field>_dict`` of old checkpoints stands for it."""
    old = raw.get(f"{field}_dict") if raw.get("model_type") == "clip" else None
    return raw.get(field) or {} if old is None else old


def _towers(f: Fields, names, kind: str, **text) -> tuple:
    towers = []
    for name, family, prefix in (("vision_config", VISION[f"{kind}_vision_model"], "vision_model."),
                                 ("text_config", TEXT[f"{kind}_text_model"], "text_model.")):  # fmt: skip
        if kind == "clip":
            f.inert(f"{name}_dict")
            f.raw[name] = part_of(f.raw, name)
        fields = f.part(name, family.defaults)
        if prefix == "text_model.":
            fields.raw |= text
        towers.append(family.read(fields, [n.removeprefix(prefix) for n in names]))
        fields.close()
    return tuple(towers)


def read_clip(f: Fields, names) -> dual.DualConfig:
    f.inert("logit_scale_init_value")
    width = f.size("projection_dim", 512)
    image, text = _towers(f, names, "clip", projection_dim=width)
    return _checked(f, image, text, out=width)


def read_siglip(f: Fields, names) -> dual.DualConfig:
    image, text = _towers(f, names, "siglip")
    return _checked(f, image, text, sigmoid=True)


def _checked(f: Fields, image, text, **more) -> dual.DualConfig:
    try:
        return dual.DualConfig(image, text, **more)
    except ValueError as error:
        raise ValueError(f"{f.where}: {error}") from None


def write(c: dual.DualConfig, family: str) -> dict:
    """config.json of a two-tower model."""
    found = dict(architectures=["SiglipModel" if c.sigmoid else "CLIPModel"], model_type=family,
                 text_config=encoders.write(c.text, f"{family}_text_model"),
                 vision_config=vision.write(c.vision, f"{family}_vision_model"))  # fmt: skip
    return found if c.sigmoid else found | dict(projection_dim=c.out)


def family_of(c: dual.DualConfig) -> str:
    """The family that has a configuration's features, else ValueError."""
    kind = "siglip" if c.sigmoid else "clip"
    towers = (vision.family_of(c.vision), encoders.family_of(c.text))
    if towers != (f"{kind}_vision_model", f"{kind}_text_model") or bool(c.out) == c.sigmoid:
        raise ValueError(f"config: expected the towers of a CLIP or a SigLIP, got {towers} with out {c.out}")
    return kind


def table(c: dual.DualConfig) -> list[Rule]:
    kind = "siglip" if c.sigmoid else "clip"
    text = under(TEXT[f"{kind}_text_model"].table(c.text), "text_model.", "text/")
    text = [r._replace(name=r.name.replace("text_model.text_projection", "text_projection")) for r in text]
    image = under(VISION[f"{kind}_vision_model"].table(c.vision), "vision_model.", "vision/")
    rules = [*image, *text, Rule("logit_scale", "scale")]
    return rules + ([Rule("logit_bias", "bias")] if c.sigmoid else dense("visual_projection", "projection"))


def _unused(c) -> tuple[str, ...]:
    return (r"\.position_ids$",)


FAMILIES = [
    Family("clip", read_clip, write, table, dual, {}, unused=_unused),
    Family("siglip", read_siglip, write, table, dual, {}, unused=_unused),
]

_gemma3 = next(f for f in language.FAMILIES if f.name == "gemma3_text")._replace(
    aliases=((r"^(language_model\.)?lm_head\.", "lm_head."), (r"^(model\.)?language_model\.(model\.)?", "model.")),
    unused=lambda c: (*language.unused(c), r"^(model\.)?(vision_tower|multi_modal_projector)\."),
)
# {model_type: {part: (its family, its field of config.json, fields beside it that it reads as well)}}
PARTS = {
    "clip": {"vision": (VISION["clip_vision_model"], "vision_config", ()),
             "text": (TEXT["clip_text_model"], "text_config", ("projection_dim",))},
    "siglip": {"vision": (VISION["siglip_vision_model"], "vision_config", ()),
               "text": (TEXT["siglip_text_model"], "text_config", ())},
    "gemma3": {"text": (_gemma3, "text_config", ())},
}  # fmt: skip
