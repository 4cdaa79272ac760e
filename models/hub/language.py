"""Language model families: llama, mistral, qwen2, qwen3, phi3."""

from __future__ import annotations

from models.hub.families import Family
from models.hub.fields import ACTIVATIONS, Fields, read_rope, short, write_rope
from models.hub.rules import Rule, dense, norm
from models.language import llm

# What transformers assumes where a config.json is silent (nested ones list only what differs).
BASE = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False)  # fmt: skip
MISTRAL = BASE | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
PHI3 = BASE | dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5)
QWEN = BASE | dict(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)


def _read(f: Fields, partial_rotary: bool = False, **block) -> llm.LLMConfig:
    """The fields that all families share; ``block`` holds what differs."""
    dim, heads = f.size("hidden_size"), f.size("num_attention_heads")
    head_dim = f.size("head_dim", dim // heads)
    length = f.size("max_position_embeddings")
    return llm.config(
        f.size("vocab_size"), f.size("num_hidden_layers"), dim, heads, kv_heads=f.size("num_key_value_heads", heads),
        head_dim=head_dim, hidden=f.size("intermediate_size"), tie=bool(f("tie_word_embeddings")), length=length,
        rope=read_rope(f, head_dim, length, partial_rotary), eps=f("rms_norm_eps"),
        activation=f.activation("hidden_act", "silu"), **block,
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


def _window(f: Fields) -> int | None:
    layers = f.size("num_hidden_layers")
    window = f("sliding_window", None) if f("use_sliding_window", False) else None
    first = f("max_window_layers", 28)
    kinds = f("layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    if len(set(kinds)) > 1 or not set(kinds) <= {"sliding_attention", "full_attention"} or len(kinds) != layers:
        raise ValueError(f"{f.where}: layer_types (use_sliding_window, max_window_layers): only one kind of attention in all "
                         f"layers is supported, got {kinds}")  # fmt: skip
    return window if kinds[0] == "sliding_attention" else None


def read_qwen2(f: Fields, names) -> llm.LLMConfig:
    return _read(f, qkv_bias=True, window=_window(f))


def read_qwen3(f: Fields, names) -> llm.LLMConfig:
    f.raw.setdefault("head_dim", 128)
    bias = bool(f("attention_bias", False))
    return _read(f, qk_norm=True, qkv_bias=bias, out_bias=bias, window=_window(f))


def read_phi3(f: Fields, names) -> llm.LLMConfig:
    f.inert("resid_pdrop", "embd_pdrop")
    f.inert("original_max_position_embeddings")  # of longrope, which ``read_rope`` refuses
    f.only("attention_bias", False)
    return _read(f, partial_rotary=True, window=f("sliding_window", None))


def write(c: llm.LLMConfig, family: str) -> dict:
    """config.json of a language model."""
    b = c.block
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
                    "phi3": "Phi3"}[family] + "ForCausalLM"
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
    if family.startswith("qwen"):
        found |= dict(use_sliding_window=b.window is not None, sliding_window=b.window, max_window_layers=0)
    if family == "qwen3":
        found |= dict(attention_bias=b.qkv_bias)
    return found


def family_of(c: llm.LLMConfig) -> str:
    """The family that has a configuration's features, else ValueError."""
    b = c.block
    if b.norm == "rms" and b.gated and b.causal and b.rope is not None and not b.layer_scale:
        square = b.qkv_bias == b.out_bias
        bare = not (b.qk_norm or b.qkv_bias or b.out_bias or b.mlp_bias)
        if b.rope.dim != b.head_dim:
            if bare and b.rope.scaling is None and b.heads * b.head_dim == b.dim:
                return "phi3"
            raise ValueError(f"config: rotary embeddings of a part of each head are written as a phi3 without scaling, got {b}")
        if b.qk_norm and square and not b.mlp_bias:
            return "qwen3"
        if not b.qk_norm and b.qkv_bias and not b.out_bias and not b.mlp_bias:
            return "qwen2"
        if not b.qk_norm and square and b.window is None:
            return "llama"
        if bare:
            return "mistral"
    raise ValueError(f"config: expected the features of one of llama, mistral, qwen2, qwen3, got {b}")


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
    rules += norm(f"{at}input_layernorm", "layers/norm1") + norm(f"{at}post_attention_layernorm", "layers/norm2")
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
    )
]  # fmt: skip
