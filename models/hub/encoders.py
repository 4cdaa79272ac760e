"""Text encoder families: bert, and the text towers of CLIP and SigLIP."""

from __future__ import annotations

from jaxattn.nn.block import BlockConfig
from models.hub.families import Family
from models.hub.fields import ACTIVATIONS, Fields, short
from models.hub.rules import Rule, dense, norm
from models.hub.vision import BERT_LIKE, CLIP_LIKE, layer_rules
from models.language import encoder

BERT = dict(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12)  # fmt: skip
CLIP = dict(vocab_size=49408, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=2048,
            max_position_embeddings=77, layer_norm_eps=1e-5, projection_dim=512, eos_token_id=49407)  # fmt: skip
SIGLIP = dict(vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
              max_position_embeddings=64, layer_norm_eps=1e-6)  # fmt: skip
LAYER = dict(norm1="attention.output.LayerNorm", norm2="output.LayerNorm", q="attention.self.query", k="attention.self.key",
             v="attention.self.value")  # fmt: skip
OLD_EOS = 2  # what CLIP's first checkpoints say: the text ends at the largest id


def _read(f: Fields, activation: str, block: dict, **fields) -> encoder.EncoderConfig:
    dim, heads = f.size("hidden_size"), f.size("num_attention_heads")
    layer = BlockConfig(dim, heads, heads, dim // heads, f.size("intermediate_size"), norm="layer", eps=f("layer_norm_eps"),
                        activation=f.activation("hidden_act", activation), gated=False, qkv_bias=True, out_bias=True,
                        mlp_bias=True, **block)  # fmt: skip
    return encoder.EncoderConfig(f.size("vocab_size"), f.size("num_hidden_layers"), layer, f.size("max_position_embeddings"),
                                 **fields)  # fmt: skip


def read_bert(f: Fields, names) -> encoder.EncoderConfig:
    f.only("position_embedding_type", "absolute")
    f.inert("classifier_dropout", "gradient_checkpointing", "tie_word_embeddings", "directionality",
            "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
            "pooler_type")  # fmt: skip
    pool = "cls" if "pooler.dense.weight" in names else ""
    return _read(f, "gelu", dict(causal=False, order="post"), types=f.size("type_vocab_size"), embed_norm=True,
                 final_norm=False, pool=pool)  # fmt: skip


def read_clip(f: Fields, names) -> encoder.EncoderConfig:
    width, eos = f.size("projection_dim"), f("eos_token_id")
    if not isinstance(eos, int):
        raise ValueError(f"{f.where}: eos_token_id: expected one token, got {eos!r}")
    out = width if "text_projection.weight" in names else 0
    return _read(f, "quick_gelu", dict(causal=True), pool="eos", eos=None if eos == OLD_EOS else eos, out=out)


def read_siglip(f: Fields, names) -> encoder.EncoderConfig:
    out = f.size("projection_size", f.size("hidden_size"))
    f.inert("projection_dim")
    return _read(f, "gelu_pytorch_tanh", dict(causal=False), pool="last", out=out, out_bias=True)


def write(c: encoder.EncoderConfig, family: str) -> dict:
    """config.json of a text encoder."""
    b = c.block
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    kind = {"bert": "BertModel", "siglip_text_model": "SiglipTextModel",
            "clip_text_model": "CLIPTextModelWithProjection" if c.out else "CLIPTextModel"}[family]  # fmt: skip
    found = dict(architectures=[kind], model_type=family, vocab_size=c.vocab, hidden_size=b.dim, intermediate_size=b.hidden,
                 num_hidden_layers=c.layers, num_attention_heads=b.heads, hidden_act=names[b.activation],
                 layer_norm_eps=short(b.eps), max_position_embeddings=c.length)  # fmt: skip
    if family == "bert":
        found |= dict(type_vocab_size=c.types)
    if family == "clip_text_model":
        found |= dict(eos_token_id=OLD_EOS if c.eos is None else c.eos) | (dict(projection_dim=c.out) if c.out else {})
    if family == "siglip_text_model":
        found |= dict(projection_size=c.out)
    return found


def family_of(c: encoder.EncoderConfig) -> str:
    """The family that has a configuration's features, else ValueError."""
    b = c.block
    if b.norm == "layer" and not b.gated and b.rope is None and b.qkv_bias and b.out_bias and b.mlp_bias and b.window is None:
        if b.order == "post" and not b.causal and c.types and c.embed_norm and not c.final_norm and c.pool in ("", "cls"):
            return "bert"
        if b.order == "pre" and c.final_norm and not c.types and not c.embed_norm:
            if c.pool == "eos" and b.causal and not c.out_bias:
                return "clip_text_model"
            if c.pool == "last" and not b.causal and c.out and c.out_bias:
                return "siglip_text_model"
    raise ValueError(f"config: expected the features of one of bert, CLIP's and SigLIP's text towers, got {c}")


def table_bert(c: encoder.EncoderConfig) -> list[Rule]:
    rules = [Rule("embeddings.word_embeddings.weight", "embed/embedding"), Rule("embeddings.position_embeddings.weight", "pos"),
             Rule("embeddings.token_type_embeddings.weight", "types"), *norm("embeddings.LayerNorm", "embed_norm", True),
             *layer_rules(c, "encoder.layer.{i}.", BERT_LIKE | LAYER)]  # fmt: skip
    return rules + dense("pooler.dense", "pooler", True) if c.pool else rules


def table_text(c: encoder.EncoderConfig) -> list[Rule]:
    """The text tower of CLIP or SigLIP."""
    rules = [Rule("embeddings.token_embedding.weight", "embed/embedding"),
             Rule("embeddings.position_embedding.weight", "pos"), *layer_rules(c, "encoder.layers.{i}.", CLIP_LIKE),
             *norm("final_layer_norm", "norm", True)]  # fmt: skip
    return rules + dense("head" if c.out_bias else "text_projection", "out", c.out_bias) if c.out else rules


def _not_text(c) -> tuple[str, ...]:
    """What a two-tower checkpoint has besides its text tower, and position numbers of old versions."""
    return (r"^vision_model\.", r"^(text|visual)_projection\.", r"^logit_(scale|bias)$", r"\.?position_ids$")


def _stored_text(c: encoder.EncoderConfig, name: str) -> str:
    """With a projection beside it, a tower's names carry its own."""
    return name if not c.out or c.out_bias or name.startswith("text_projection") else f"text_model.{name}"


TEXT_TOWER = ((r"^text_model\.", ""),)
FAMILIES = [
    Family("bert", read_bert, write, table_bert, encoder, BERT,
           ((r"^bert\.", ""), (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias")),
           unused=lambda c: (r"embeddings\.position_ids$", r"^cls\.predictions\.decoder\."), keep=(r"^cls\.",)),
    Family("clip_text_model", read_clip, write, table_text, encoder, CLIP, TEXT_TOWER, _stored_text, unused=_not_text),
    Family("siglip_text_model", read_siglip, write, table_text, encoder, SIGLIP, TEXT_TOWER, unused=_not_text),
]  # fmt: skip
