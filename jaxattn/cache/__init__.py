"""Cache policies: which keys exist while decoding."""

from jaxattn.cache.duoattention import duoattention, retrieval_heads
from jaxattn.cache.full import full
from jaxattn.cache.h2o import h2o, h2o_mask
from jaxattn.cache.streamingllm import evict_for_space, evict_range, streamingllm
from jaxattn.cache.tidaldecode import tidaldecode

__all__ = [
    "duoattention", "evict_for_space", "evict_range", "full", "h2o", "h2o_mask", "retrieval_heads", "streamingllm",
    "tidaldecode",
]  # fmt: skip
