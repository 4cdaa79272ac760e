"""Key maps as data: which stored tensor is which parameter, and in what layout.

A family's table is a list of Rules; reading, checking and writing a checkpoint all follow it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """One line of a key map.

    name: of the stored tensor; "{i}" stands for the layer.  path: of our parameter; below "layers/" it has a leading layer
      axis.
    layout: how (a part of) the stored tensor is seen: "same"; "transpose" ([out, in] as [in, out]); "conv" ([out, ch, p, p]
      as [p * p * ch, out], or [out, ch, t, p, p] as [t * p * p * ch, out]); "rows" ([..., C] as [rows, C]).
    shape: of the stored tensor, where the parameter's does not say.
    part: rows [a, b) of the stored tensor that this parameter takes.  rows: rows [a, b) of the parameter that it fills.
    """

    name: str
    path: str
    layout: str = "same"
    shape: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None


class Piece(NamedTuple):
    """A rule at one layer: names and shapes are concrete."""

    name: str
    path: str
    layer: int | None
    layout: str
    shape: tuple[int, ...]
    part: tuple[int, int] | None
    rows: tuple[int, int] | None

    def see(self, stored: np.ndarray) -> np.ndarray:
        """(Rows of) this piece's parameter in the stored tensor; a view where the layout allows."""
        x = stored.reshape(-1, stored.shape[-1]) if self.layout == "rows" else stored
        x = x if self.part is None else x[slice(*self.part)]
        if self.layout == "conv":
            return x.transpose(*range(2, x.ndim), 1, 0).reshape(-1, x.shape[0])
        return x.T if self.layout == "transpose" else x

    def put(self, stored: np.ndarray, value: np.ndarray) -> None:
        """Write (rows of) a parameter's value into the stored tensor: the inverse of ``see``."""
        x = stored.reshape(-1, stored.shape[-1]) if self.layout == "rows" else stored
        x = x if self.part is None else x[slice(*self.part)]
        if self.layout == "conv":
            out, channels, *window = self.shape
            value = value.reshape(*window, channels, out)
            value = value.transpose(value.ndim - 1, value.ndim - 2, *range(len(window)))
        x[...] = value.T if self.layout == "transpose" else value


def expand(rules: list[Rule], shapes: dict[str, tuple[int, ...]]) -> list[Piece]:
    """Pieces of a table for parameters of given shapes {path: shape}."""
    pieces = []
    for rule in rules:
        whole = shapes[rule.path]
        layers = whole[0] if "{i}" in rule.name else None
        inner = whole if layers is None else whole[1:]
        shape = rule.shape or (inner[::-1] if rule.layout == "transpose" else inner)
        for i in range(layers or 1):
            layer = None if layers is None else i
            pieces.append(Piece(rule.name.replace("{i}", str(i)), rule.path, layer, rule.layout, shape, rule.part, rule.rows))
    return pieces


def dense(name: str, path: str, bias: bool = False) -> list[Rule]:
    """weight [out, in] and bias of a linear map."""
    rules = [Rule(f"{name}.weight", f"{path}/kernel", "transpose")]
    return rules + [Rule(f"{name}.bias", f"{path}/bias")] if bias else rules


def norm(name: str, path: str, bias: bool = False) -> list[Rule]:
    """weight and bias of a norm."""
    return [Rule(f"{name}.weight", f"{path}/scale")] + ([Rule(f"{name}.bias", f"{path}/bias")] if bias else [])


def under(rules: list[Rule], name: str, path: str) -> list[Rule]:
    """A table of a part of a larger model: names below ``name``, paths below ``path``."""
    return [rule._replace(name=name + rule.name, path=path + rule.path) for rule in rules]
