"""Token transforms: which rows of the residual stream go on."""

from jaxattn.tokens.fastervlm import fastervlm
from jaxattn.tokens.hiprune import hiprune
from jaxattn.tokens.mmtok import mmtok

__all__ = ["fastervlm", "hiprune", "mmtok"]
