"""Language model families: llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3_text."""

from __future__ import annotations

import dataclasses

import numpy as np

from models.hub.families import Family
from models.hub.fields import ACTIVATIONS, KINDS, Fields, read_kinds, read_rope, read_ropes, short, write_kinds, write_rope
from models.hub.rules import Rule, dense, norm
from models.language import llm

# What transformers assumes where a config.json is silent (nested ones list only what differs).
BASE = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False)  # fmt: skip
MISTRAL = BASE | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
PHI3 = BASE | dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5,
                   original_max_position_embeddings=4096)  # fmt: skip
GEMMA = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
             head_dim=256, rms_norm_eps=1e-6, tie_word_embeddings=True, query_pre_attn_scalar=256,
             sliding_window=4096)  # fmt: skip
GEMMA2 = GEMMA | dict(vocab_size=256000, max_position_embeddings=8192)
GEMMA3 = GEMMA | dict(vocab_size=262208, max_position_embeddings=131072)
QWEN = BASE | dict(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)


def _read(f: Fields, partial_rotary: bool = False, rope=None, activation: str = "hidden_act", **rest) -> llm.LLMConfig:
    """The fields that all families share; ``rest`` holds what differs."""
    dim, heads = f.size("hidden_size"), f.size("num_attention_heads")
    head_dim = f.size("head_dim", dim // heads)
    length = f.size("max_position_embeddings")
    return llm.config(
        f.size("vocab_size"), f.size("num_hidden_layers"), dim, heads, kv_heads=f.size("num_key_value_heads", heads),
        head_dim=head_dim, hidden=f.size("intermediate_size"), tie=bool(f("tie_word_embeddings")), length=length,
        rope=rope or read_rope(f, head_dim, length, partial_rotary), eps=f("rms_norm_eps"),
        activation=f.activation(activation, "silu" if activation == "hidden_act" else "gelu_pytorch_tanh"), **rest,
    )  # fmt: skip


def read_llama(f: Fields, names) -> llm.LLMConfig:
    f.only("pretraining_tp", *range(1, 65))  # a way to cut the matrix products, with the same result
    bias = bool(f("attention_bias", False))
    return _read(f, qkv_bias=bias, out_bias=bias, mlp_bias=bool(f("mlp_bias", False)))


def read_mistral(f: Fields, names) -> llm.LLMConfig:
    # "sliding_window": null means full attention; absent means the default of transformers.
    window = f.raw["sliding_window"]
    f.inert("sliding_window")
    return _read(f, window=window)


def _windows(f: Fields) -> dict:
    window = f("sliding_window", None) if f("use_sliding_window", False) else None
    first = f("max_window_layers", 28)
    kinds = write_kinds(f.size("num_hidden_layers"), window, tuple(range(first)))
    window, full = read_kinds(f, window, kinds)
    return dict(window=window, full_layers=full)


def read_qwen2(f: Fields, names) -> llm.LLMConfig:
    f.only("use_mrope", False)
    return _read(f, qkv_bias=True, **_windows(f))


def read_qwen3(f: Fields, names) -> llm.LLMConfig:
    f.raw.setdefault("head_dim", 128)
    bias = bool(f("attention_bias", False))
    return _read(f, qk_norm=True, qkv_bias=bias, out_bias=bias, **_windows(f))


def read_phi3(f: Fields, names) -> llm.LLMConfig:
    f.inert("resid_pdrop", "embd_pdrop")
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        f.only(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):  # of Phi-4's own code
        f.only(name, 1)
    return _read(f, partial_rotary=True, window=f("sliding_window", None))


def _gemma(f: Fields, every: int, **rest) -> llm.LLMConfig:
    """What both Gemmas share; ``every``: each layer of that number has no window."""
    f.only("attention_bias", False)
    f.only("use_bidirectional_attention", False)
    f.inert("hidden_act", "_sliding_window_pattern")  # ``hidden_activation`` and ``layer_types`` are read
    window = f("sliding_window", None)
    kinds = [KINDS[(i + 1) % every == 0] for i in range(f.size("num_hidden_layers"))]
    window, full = read_kinds(f, window, kinds)
    return _read(f, activation="hidden_activation", window=window, full_layers=full, order="both", unit_offset=True,
                 scale=f("query_pre_attn_scalar") ** -0.5, embed_scale=f.size("hidden_size") ** 0.5, **rest)  # fmt: skip


def read_gemma2(f: Fields, names) -> llm.LLMConfig:
    return _gemma(f, 2, cap=_cap(f, "attn_logit_softcapping", 50.0), logit_cap=_cap(f, "final_logit_softcapping", 30.0))


def read_gemma3(f: Fields, names) -> llm.LLMConfig:
    rope, local = read_ropes(f, f.size("head_dim"), f.size("max_position_embeddings"), 1e6, 1e4)
    c = _gemma(f, f.size("sliding_window_pattern", 6), rope=rope, qk_norm=True,
               cap=_cap(f, "attn_logit_softcapping", None), logit_cap=_cap(f, "final_logit_softcapping", None))  # fmt: skip
    if c.block.window is None or local == rope:
        return c
    turned = dict(local_rope=local) if c.block.full_layers else dict(rope=local)
    return dataclasses.replace(c, block=dataclasses.replace(c.block, **turned))


def _cap(f: Fields, name: str, default: float | None) -> float | None:
    """A soft cap: null is none, absent what the family assumes."""
    value = f.raw.get(name, default)
    f.inert(name)
    return value


def write(c: llm.LLMConfig, family: str) -> dict:
    """config.json of a language model."""
    b = c.block
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3",
                    "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[family] + "ForCausalLM"  # fmt: skip
    found = dict(
        architectures=[architecture], model_type=family, vocab_size=c.vocab, hidden_size=b.dim, intermediate_size=b.hidden,
        num_hidden_layers=c.layers, num_attention_heads=b.heads, num_key_value_heads=b.kv_heads, head_dim=b.head_dim,
        hidden_act=names[b.activation], max_position_embeddings=c.length, rms_norm_eps=short(b.eps), tie_word_embeddings=c.tie,
        **write_rope(b.rope, b.head_dim),
    )  # fmt: skip
    if family in ("mistral", "phi3"):
        found |= dict(sliding_window=b.window)
    if family == "llama":
        found |= dict(attention_bias=b.qkv_bias, mlp_bias=b.mlp_bias)
    if family == "phi3" and b.rope.scaling is not None:
        found |= dict(original_max_position_embeddings=b.rope.scaling.original_length)
    if family.startswith("qwen"):
        found |= dict(use_sliding_window=b.window is not None, sliding_window=b.window, max_window_layers=0)
        found |= dict(layer_types=write_kinds(c.layers, b.window, b.full_layers)) if b.full_layers else {}
    if family.startswith("gemma"):
        found |= dict(hidden_activation=found.pop("hidden_act"), sliding_window=b.window, attn_logit_softcapping=b.cap,
                      final_logit_softcapping=c.cap, query_pre_attn_scalar=_whole(b.scale**-2),
                      layer_types=write_kinds(c.layers, b.window, b.full_layers))  # fmt: skip
    if family == "gemma3_text":
        found |= _write_ropes(found, b)
    if family == "qwen3":
        found |= dict(attention_bias=b.qkv_bias)
    return found


def _whole(x: float) -> float | int:
    return round(x) if abs(x - round(x)) < 1e-4 * x else short(x)


def _write_ropes(found: dict, b) -> dict:
    """The rotary embeddings of full and of windowed layers, by kind."""
    full, local = (b.rope, b.local_rope) if b.full_layers and b.local_rope else (b.rope, b.rope)
    kinds = {}
    for kind, rope in zip(KINDS, (local, full), strict=True):
        said = write_rope(rope, b.head_dim)
        kinds[kind] = {"rope_type": "default", "rope_theta": said["rope_theta"], **said.get("rope_scaling", {})}
    for name in ("rope_theta", "rope_scaling"):
        found.pop(name, None)
    return {"rope_parameters": kinds}


def family_of(c: llm.LLMConfig) -> str:
    """The family that has a configuration's features, else ValueError."""
    b = c.block
    if b.order == "both" and b.unit_offset and b.scale is not None and b.rope is not None and b.gated:
        known = "gemma3_text" if b.qk_norm else "gemma2"
        if c.embed_scale == np.float32(b.dim**0.5) and not (b.qkv_bias or b.out_bias or b.mlp_bias or b.layer_scale):
            return known
    plain = b.order == "pre" and not b.unit_offset and b.scale is None and b.cap is None and b.local_rope is None
    plain = plain and c.cap is None and c.embed_scale == 1
    if plain and b.norm == "rms" and b.gated and b.causal and b.rope is not None and not b.layer_scale:
        square = b.qkv_bias == b.out_bias
        bare = not (b.qk_norm or b.qkv_bias or b.out_bias or b.mlp_bias)
        kind = b.rope.scaling and b.rope.scaling.kind
        if b.rope.dim != b.head_dim or kind == "longrope":
            if bare and kind in (None, "longrope") and not b.full_layers and b.heads * b.head_dim == b.dim:
                return "phi3"
        if b.rope.dim != b.head_dim:
            raise ValueError(f"config: rotary embeddings of a part of each head are written as a phi3, got {b}")
        if b.qk_norm and square and not b.mlp_bias:
            return "qwen3"
        if not b.qk_norm and b.qkv_bias and not b.out_bias and not b.mlp_bias:
            return "qwen2"
        if not b.qk_norm and square and b.window is None:
            return "llama"
        if bare and not b.full_layers:
            return "mistral"
    raise ValueError(f"config: expected the features of one of llama, mistral, qwen2, qwen3, gemma2, gemma3_text, got {c}")


def table(c: llm.LLMConfig) -> list[Rule]:
    """The key map of a language model."""
    b, at = c.block, "model.layers.{i}."
    rules = [Rule("model.embed_tokens.weight", "embed/embedding"), *norm("model.norm", "norm")]
    for ours in "qkvo":
        bias = b.out_bias if ours == "o" else b.qkv_bias
        rules += dense(f"{at}self_attn.{ours}_proj", f"layers/attn/{ours}", bias)
    if b.qk_norm:
        rules += norm(f"{at}self_attn.q_norm", "layers/attn/q_norm") + norm(f"{at}self_attn.k_norm", "layers/attn/k_norm")
    for ours in ("gate", "up", "down"):
        rules += dense(f"{at}mlp.{ours}_proj", f"layers/mlp/{ours}", b.mlp_bias)
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if b.order == "both":
        names = {"norm1": "input_layernorm", "norm1_out": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
                 "norm2_out": "post_feedforward_layernorm"}  # fmt: skip
    rules += [rule for ours, theirs in names.items() for rule in norm(f"{at}{theirs}", f"layers/{ours}")]
    return rules if c.tie else rules + dense("lm_head", "head")


def table_phi3(c: llm.LLMConfig) -> list[Rule]:
    """q, k, v are rows of one stored tensor, gate and up of another."""
    b, at = c.block, "model.layers.{i}."
    wide, narrow = b.heads * b.head_dim, b.kv_heads * b.head_dim
    fused = {"q": (0, wide), "k": (wide, wide + narrow), "v": (wide + narrow, wide + 2 * narrow)}
    halves = {"gate": (0, b.hidden), "up": (b.hidden, 2 * b.hidden)}
    rules = [rule for rule in table(c) if not rule.path.startswith(tuple(f"layers/attn/{n}/" for n in fused))
             and not rule.path.startswith(tuple(f"layers/mlp/{n}/" for n in halves))]  # fmt: skip
    rules += [Rule(f"{at}self_attn.qkv_proj.weight", f"layers/attn/{n}/kernel", "transpose", (wide + 2 * narrow, b.dim), part)
              for n, part in fused.items()]  # fmt: skip
    return rules + [Rule(f"{at}mlp.gate_up_proj.weight", f"layers/mlp/{n}/kernel", "transpose", (2 * b.hidden, b.dim), part)
                    for n, part in halves.items()]  # fmt: skip


def unused(c: llm.LLMConfig) -> tuple[str, ...]:
    """Stored tensors that transformers does not read either: buffers of old versions, a second copy of a tied head."""
    return (r"rotary_emb\.inv_freq$", *((r"^lm_head\.weight$",) if c.tie else ()))


FAMILIES = [
    Family(name, read, write, keys, llm, defaults, unused=unused)
    for name, read, keys, defaults in (
        ("llama", read_llama, table, BASE), ("mistral", read_mistral, table, MISTRAL),
        ("qwen2", read_qwen2, table, QWEN), ("qwen3", read_qwen3, table, QWEN), ("phi3", read_phi3, table_phi3, PHI3),
        ("gemma2", read_gemma2, table, GEMMA2), ("gemma3_text", read_gemma3, table, GEMMA3),
    )
]  # fmt: skip
