"""Attention with another normaliser, gate or layout."""

from jaxattn.attention.pointwise import kv_bias, pointwise_attention

__all__ = ["kv_bias", "pointwise_attention"]
