"""Token transforms: which rows of the residual stream go on.

Factories return records for a model's ``reduce`` socket; the functions beside them choose alike on plain arrays.
"""

from jaxattn.tokens.aim import aim, aim_merge, aim_merge_tokens, pagerank_importance
from jaxattn.tokens.baselines import mean_pool, random, uniform
from jaxattn.tokens.fastervlm import fastervlm, fastervlm_scores
from jaxattn.tokens.hiprune import hiprune, hiprune_scores, hiprune_select
from jaxattn.tokens.mmtok import content_mask, content_words, mmtok, mmtok_coverage, mmtok_picks, mmtok_select

__all__ = [
    "aim", "aim_merge", "aim_merge_tokens", "content_mask", "content_words", "fastervlm", "fastervlm_scores", "hiprune",
    "hiprune_scores", "hiprune_select", "mean_pool", "mmtok", "mmtok_coverage", "mmtok_picks", "mmtok_select",
    "pagerank_importance", "random", "uniform",
]  # fmt: skip
