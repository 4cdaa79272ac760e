"""What is minimised."""

from jaxattn.objectives.as_vit import as_vit, flops_share
from jaxattn.objectives.duoattention import duoattention, duoattention_gates, duoattention_streams
from jaxattn.objectives.dyvte import dyvte, exit_label, router_loss
from jaxattn.objectives.focusui import focusui, target_share
from jaxattn.objectives.meap import meap
from jaxattn.objectives.next_token import cross_entropy, next_token
from jaxattn.objectives.sit import sit

__all__ = [
    "as_vit", "cross_entropy", "duoattention", "duoattention_gates", "duoattention_streams", "dyvte", "exit_label",
    "flops_share", "focusui", "meap", "next_token", "router_loss", "sit", "target_share",
]  # fmt: skip
