"""What can be seen inside a forward pass."""

from jaxattn.analysis.attention_sink_emergence import attention_sink_emergence, importance, norm_profile, sink_rate
from jaxattn.analysis.taxonomy import Place, classify, examples, markdown, taxonomy
from jaxattn.analysis.text_dominance import dominance, layer_groups, text_dominance
from jaxattn.analysis.token_reduction_purposes import non_monotone, oracle, steadiness, token_reduction_purposes

__all__ = [
    "attention_sink_emergence", "classify", "dominance", "examples", "importance", "layer_groups", "markdown",
    "non_monotone", "norm_profile", "oracle", "Place", "sink_rate", "steadiness", "taxonomy", "text_dominance",
    "token_reduction_purposes",
]  # fmt: skip
