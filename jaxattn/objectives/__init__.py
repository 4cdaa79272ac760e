"""What is minimised."""

from jaxattn.objectives.duoattention import duoattention, duoattention_gates, duoattention_streams
from jaxattn.objectives.meap import meap
from jaxattn.objectives.next_token import cross_entropy, next_token

__all__ = ["cross_entropy", "duoattention", "duoattention_gates", "duoattention_streams", "meap", "next_token"]
