"""What can be seen inside a forward pass."""

from jaxattn.analysis.attention_sink_emergence import attention_sink_emergence, importance, norm_profile, sink_rate

__all__ = ["attention_sink_emergence", "importance", "norm_profile", "sink_rate"]
