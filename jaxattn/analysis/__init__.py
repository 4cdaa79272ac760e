"""What can be seen inside a forward pass."""

from jaxattn.analysis.attention_sink_emergence import attention_sink_emergence, importance, norm_profile, sink_rate
from jaxattn.analysis.text_dominance import dominance, layer_groups, text_dominance

__all__ = [
    "attention_sink_emergence", "dominance", "importance", "layer_groups", "norm_profile", "sink_rate", "text_dominance",
]  # fmt: skip
