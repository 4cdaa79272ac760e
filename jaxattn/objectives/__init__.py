"""What is minimised."""

from jaxattn.objectives.as_vit import as_vit, flops_share
from jaxattn.objectives.duoattention import duoattention, duoattention_gates, duoattention_streams
from jaxattn.objectives.dyvte import dyvte, exit_label, router_loss
from jaxattn.objectives.meap import meap
from jaxattn.objectives.next_token import cross_entropy, next_token

__all__ = [
    "as_vit", "cross_entropy", "duoattention", "duoattention_gates", "duoattention_streams", "dyvte", "exit_label",
    "flops_share", "meap", "next_token", "router_loss",
]  # fmt: skip
