"""What a family of checkpoints is: how its config.json is read and written, and its key map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from models.hub.rules import Rule


class Family(NamedTuple):
    """One model_type.

    name: model_type.  read: (Fields, stored names) -> our config.  write: (config, name) -> config.json.
    table: config -> Rules.  model: the module with init and bind.  defaults: of fields that a config.json may leave out.
    aliases: (pattern, replacement) pairs, applied in turn, that bring stored names to the table's.
    stored: (config, the table's name) -> the name that transformers writes.
    unused: config -> patterns of stored tensors that are no part of the model (buffers, copies, another tower).
    keep: patterns of tensors that no forward pass here reads, kept in params["extra"] so that saving gives them back.
    """

    name: str
    read: Callable
    write: Callable
    table: Callable[[Any], list[Rule]]
    model: Any
    defaults: dict
    aliases: tuple[tuple[str, str], ...] = ()
    stored: Callable[[Any, str], str] = lambda c, name: name
    unused: Callable[[Any], tuple[str, ...]] = lambda c: ()
    keep: tuple[str, ...] = ()
