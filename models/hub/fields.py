"""Fields of a config.json, each accounted for: read, known to be without effect on a forward pass, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxattn.core.rope import Rope, RopeScaling

# Bookkeeping, training noise and generation defaults: what a forward pass computes does not depend on them.
INERT = frozenset(
    """_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash architectures model_type torch_dtype dtype
    transformers_version use_cache initializer_range initializer_factor attention_dropout hidden_dropout hidden_dropout_prob
    attention_probs_dropout_prob drop_path_rate dropout layerscale_value id2label label2id num_labels problem_type
    finetuning_task task_specific_params tokenizer_class prefix torchscript return_dict output_attentions
    output_hidden_states output_scores return_dict_in_generate bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id bad_words_ids begin_suppress_tokens suppress_tokens
    do_sample early_stopping length_penalty max_length min_length no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_beams num_beam_groups diversity_penalty num_return_sequences remove_invalid_values repetition_penalty temperature
    top_k top_p typical_p exponential_decay_length_penalty chunk_size_feed_forward use_bfloat16 tf_legacy_loss
    cross_attention_hidden_size auto_map cache_implementation""".split()
)
# What transformers' base configuration may carry; any other value would change the model.
PLAIN = {"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False,
         "pruned_heads": {}}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}  # fmt: skip
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip
KINDS = ("sliding_attention", "full_attention")


class Fields:
    """A config.json (or a part of one). Calling reads a field; ``close`` refuses what nobody read."""

    def __init__(self, raw: dict, where: str = "config.json", defaults: dict | None = None):
        self.raw, self.where, self.seen = {**(defaults or {}), **raw}, where, set()

    def __call__(self, name: str, default: Any = ...) -> Any:
        self.seen.add(name)
        value = self.raw.get(name)
        if value is None and default is ...:
            raise ValueError(f"{self.where}: expected the field {name!r}, it has {sorted(self.raw)}")
        return default if value is None else value

    def size(self, name: str, default: Any = ...) -> int:
        value = self(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.where}: {name}: expected a positive integer, got {value!r}")
        return value

    def only(self, name: str, *allowed: Any) -> Any:
        """A field that may only have the given values; the first is its default."""
        value = self(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{self.where}: {name} = {value!r} is not supported, expected one of {list(allowed)}")
        return value

    def activation(self, name: str, default: str) -> str:
        return ACTIVATIONS[self.only(name, *sorted(ACTIVATIONS, key=lambda a: a != default))]

    def part(self, name: str, defaults: dict | None = None) -> Fields:
        value = self(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}: {name}: expected an object, got {value!r}")
        return Fields(value, f"{self.where}: {name}", defaults)

    def inert(self, *names: str) -> None:
        """Fields known to change nothing of what this model computes."""
        self.seen.update(names)

    def close(self) -> None:
        for name, value in PLAIN.items():
            self.only(name, value)
        unknown = {k: v for k, v in self.raw.items() if k not in self.seen | INERT and v is not None}
        if unknown:
            raise ValueError(f"{self.where}: fields that are not supported: {_brief(unknown)}")


def _brief(fields: dict) -> str:
    return ", ".join(f"{k} = {str(v)[:60]}" for k, v in sorted(fields.items()))


def read_rope(f: Fields, head_dim: int, length: int, partial_rotary: bool = False) -> Rope:
    """The rotary embedding of ``rope_parameters``, or of ``rope_theta`` and ``rope_scaling`` (transformers before 5).

    ``partial_rotary``: the family may leave a part of each head unrotated."""
    old, new = f("rope_scaling", None), f("rope_parameters", None)
    where = f"{f.where}: {'rope_parameters' if new else 'rope_scaling'}"
    plain = {"rope_theta": f("rope_theta", 10000.0), "partial_rotary_factor": f("partial_rotary_factor", 1.0)}
    return _rope({**plain, **(new or old or {})}, where, head_dim, length, f("original_max_position_embeddings", None),
                 partial_rotary)  # fmt: skip


def read_ropes(f: Fields, head_dim: int, length: int, theta: float, local_theta: float) -> tuple[Rope, Rope]:
    """(of full layers, of layers with a window): ``rope_parameters`` by kind, or ``rope_theta`` with ``rope_scaling`` and
    ``rope_local_base_freq`` (transformers before 5)."""
    full, local = {"rope_theta": f("rope_theta", theta)}, {"rope_theta": f("rope_local_base_freq", local_theta)}
    old, new = f("rope_scaling", None), f("rope_parameters", None) or {}
    where = f"{f.where}: {'rope_parameters' if new else 'rope_scaling'}"
    if unknown := {k: v for k, v in new.items() if k not in KINDS}:
        raise ValueError(f"{where}: expected {' and '.join(KINDS)}, got {_brief(unknown)}")
    full |= (new.get("full_attention") or {}) | (old or {})
    local |= new.get("sliding_attention") or {}
    return tuple(_rope(raw, where, head_dim, length, None, False) for raw in (full, local))


def _rope(raw: dict, where: str, head_dim: int, length: int, original: int | None, partial_rotary: bool) -> Rope:
    """A Rope from one dict of parameters; ``original``: the trained length that stands beside it, which wins."""
    raw = dict(raw)
    theta, partial = raw.pop("rope_theta"), raw.pop("partial_rotary_factor", 1.0)
    kind, again = raw.pop("rope_type", None), raw.pop("type", None)
    kind = {"su": "longrope"}.get(kind or again or "default", kind or again or "default")
    if kind not in ROPE_FIELDS:
        raise ValueError(f"{where}: rope_type = {kind!r} is not supported, expected one of {sorted(ROPE_FIELDS)}")
    unknown = {k: v for k, v in raw.items() if k not in ROPE_FIELDS[kind] and v is not None}
    if kind == "default":  # leftovers of another kind, which transformers does not read either
        unknown = {k: v for k, v in unknown.items() if k not in sum(ROPE_FIELDS.values(), ())}
    if partial != 1 and not partial_rotary:
        unknown["partial_rotary_factor"] = partial
    if unknown:
        raise ValueError(f"{where}: fields that are not supported with {kind!r}: {_brief(unknown)}")
    if kind == "dynamic":  # the length that transformers compares with, whatever the dict says
        raw["original_max_position_embeddings"] = length
    elif original is not None:
        raw["original_max_position_embeddings"] = original
    try:
        rope = Rope(int(head_dim * partial), theta, scaling=RopeScaling.from_config({"rope_type": kind, **raw}, length))
        rope.frequencies()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return rope


def read_kinds(f: Fields, window: int | None, default: list[str]) -> tuple[int | None, tuple[int, ...]]:
    """(window, numbers of the layers without it) of ``layer_types``, of which ``default`` is what other fields say."""
    kinds = f("layer_types", None) or default
    if not set(kinds) <= set(KINDS) or len(kinds) != len(default):
        raise ValueError(f"{f.where}: layer_types: expected {len(default)} of {list(KINDS)}, got {kinds}")
    if KINDS[0] not in kinds:
        return None, ()
    if window is None:
        raise ValueError(f"{f.where}: layer_types: expected a sliding_window for {KINDS[0]!r}, got None")
    full = tuple(i for i, kind in enumerate(kinds) if kind == KINDS[1])
    return window, full


def write_kinds(layers: int, window: int | None, full: tuple[int, ...]) -> list[str]:
    """``layer_types``."""
    return [KINDS[window is None or i in full] for i in range(layers)]


def short(x: float) -> float:
    """The shortest decimal number that is the same in float32: 1e-05 for what records keep of it."""
    return float(str(np.float32(x)))


def write_rope(rope: Rope, head_dim: int) -> dict:
    """``rope_theta`` and ``rope_scaling``, which every version of transformers reads."""
    fields: dict = {"rope_theta": short(rope.base)}
    if rope.dim != head_dim:
        fields["partial_rotary_factor"] = rope.dim / head_dim
    if rope.scaling is not None:
        ours = {"original_max_position_embeddings": "original_length"}
        names = ROPE_FIELDS[rope.scaling.kind]
        values = {n: getattr(rope.scaling, ours.get(n, n)) for n in names}
        said = {k: [short(x) for x in v] if isinstance(v, tuple) else short(v) if isinstance(v, float) else v
                for k, v in values.items() if v is not None}  # fmt: skip
        fields["rope_scaling"] = {"rope_type": rope.scaling.kind, **said}
    return fields
