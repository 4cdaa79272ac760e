"""Linear and recurrent attention."""

from jaxattn.linear.agent_attention import agent_attend, agent_attention, agent_sd
from jaxattn.linear.lightning_attention import (
    alibi_slopes,
    layer_slopes,
    lightning_attention,
    lightning_attention_2,
    sglu,
    simple_rms_norm,
)  # fmt: skip

__all__ = [
    "agent_attend", "agent_attention", "agent_sd", "alibi_slopes", "layer_slopes", "lightning_attention",
    "lightning_attention_2", "sglu", "simple_rms_norm",
]  # fmt: skip
