"""Edits of what a trained layer computes."""

from jaxattn.steering.var import var, var_reference
from jaxattn.steering.vhr import t_vhd, vhr
from jaxattn.steering.zerotuning import zerotuning, zerotuning_search

__all__ = ["t_vhd", "var", "var_reference", "vhr", "zerotuning", "zerotuning_search"]
