"""Token transforms: which rows of the residual stream go on."""

from jaxattn.tokens.aim import aim, aim_merge
from jaxattn.tokens.baselines import mean_pool, random, uniform
from jaxattn.tokens.fastervlm import fastervlm
from jaxattn.tokens.hiprune import hiprune
from jaxattn.tokens.mmtok import mmtok

__all__ = ["aim", "aim_merge", "fastervlm", "hiprune", "mean_pool", "mmtok", "random", "uniform"]
