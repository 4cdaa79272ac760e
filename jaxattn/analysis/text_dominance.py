"""How much a multimodal model reads its text and how much the rest ("When Language Overrules: Revealing Text Dominance in
Multimodal Large Language Models").

With A_T and A_O the attention that generated rows give to text and to the other modality, over all heads, and |T|, |O|
the numbers of those tokens:

    MDI   = (A_T / |T|) / (A_O / |O|)           above 1: dominated by text
    AEI_T = P_T / Q_T,   P_T = A_T / (A_T + A_O),   Q_T = |T| / (|T| + |O|),   AEI_O = (1 - P_T) / (1 - Q_T)

so that MDI = AEI_T / AEI_O. Tokens in neither set (system prompt, special tokens) count nowhere. The paper averages over
early, middle and late layers, and compresses the image by [CLS] attention (``tokens.fastervlm``) to bring MDI down.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxattn.core.types import Array, Need, contract, expect
from jaxattn.registry import register


def dominance(attention: Array, text: Array, other: Array) -> dict[str, Array]:
    """MDI and AEI from attention given to each key.

    Args:
      attention: [..., S], summed over rows and heads, at least 0.
      text, other: bool, broadcastable to it; the tokens of either modality (valid ones).
    Returns: {"mdi", "aei_text", "aei_other"} of shape [...]. Without tokens or mass on a side the ratios are inf or nan,
      as the definition has it.
    """
    wide = attention.astype(jnp.promote_types(attention.dtype, jnp.float32))
    text, other = (jnp.broadcast_to(x, wide.shape) for x in (text, other))
    mass_t, mass_o = (jnp.where(x, wide, 0).sum(-1) for x in (text, other))
    n_t, n_o = (x.sum(-1).astype(wide.dtype) for x in (text, other))
    share, size = mass_t / (mass_t + mass_o), n_t / (n_t + n_o)
    return {
        "mdi": (mass_t / n_t) / (mass_o / n_o),
        "aei_text": share / size,
        "aei_other": (1 - share) / (1 - size),
    }


def layer_groups(values: Array) -> Array:
    """[..., 3] means over the first, middle and last third of the layers [..., L] (the middle takes what is left over)."""
    depth = values.shape[-1]
    expect("values", f"{depth} layers", "at least 3", depth >= 3)
    third = depth // 3
    parts = (values[..., :third], values[..., third : depth - third], values[..., depth - third :])
    return jnp.stack([part.mean(-1) for part in parts], -1)


@contract
class _TextDominance:
    layers: tuple
    rows: str | int = "last"
    site: str = "llm"

    def _name(self, layer: int) -> str:
        return f"text_dominance.{layer}"

    def needs(self) -> tuple[Need, ...]:
        return tuple(
            Need(self._name(layer), "received", f"{self.site}.{layer}", self.rows, over_heads="sum", total=True)
            for layer in self.layers
        )

    def reduce(self, evidence: dict[str, Array], text: Array, other: Array) -> dict[str, Array]:
        """Evidence of a forward pass to the paper's figures.

        Args: text, other: bool [B|1, S] over the rows of the stack (``streams.spans()`` and ``streams.meta`` of its output).
        Returns: mdi, aei_text, aei_other float32 [B, L]; with three layers or more also mdi_groups [B, 3]: early, middle, late.
        """
        names = [self._name(layer) for layer in self.layers]
        missing = [name for name in names if name not in evidence]
        expect("evidence", f"none of {missing}", "the answers to this record's needs", not missing)
        found = dominance(jnp.stack([evidence[name] for name in names], 1), text[:, None], other[:, None])
        return found | ({"mdi_groups": layer_groups(found["mdi"])} if len(names) >= 3 else {})


@register("analysis")
def text_dominance(layers, *, rows: str | int = "last", site: str = "llm") -> _TextDominance:
    """Text dominance of a model. Bind the record beside the steering methods, then ``reduce(evidence, text, other)``.

    Args:
      layers: how many layers the model has, or the numbers of those to look at.
      rows: whose attention counts: "last" (the row that generates the first token) or the number of last rows, with a
        generated answer appended to the prompt: its length.
      site: the stack.
    """
    layers = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
    expect("layers", layers, "at least one layer", len(layers) > 0)
    return _TextDominance(layers, rows, site)


__all__ = ["dominance", "layer_groups", "text_dominance"]
