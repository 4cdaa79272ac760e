"""From a name on a command line to a record: one table of factories per socket.

    @register("tokens")
    def hiprune(keep, ...): ...

    registry.parse("tokens", "hiprune:keep=64,alpha=0.1")    # == tokens.hiprune(keep=64, alpha=0.1)

A factory is known by its function name, the system's slug with underscores. The families are imported at the
first look-up, so this module depends on none of them.
"""

import ast
import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

SOCKETS = (
    "attention",
    "mixer",
    "tokens",
    "cache",
    "steering",
    "sampler",
    "objective",
    "conversion",
    "analysis",
)

# A folder says what its papers are about, not which socket they fill: all are searched for every socket.
FAMILIES = (
    "attention",
    "sparse",
    "spatial",
    "linear",
    "experts",
    "mixers",
    "pooling",
    "fusion",
    "tokens",
    "cache",
    "steering",
    "analysis",
    "objectives",
    "quantize",
    "vocabulary",
)

_factories: dict[str, dict[str, Callable]] = {socket: {} for socket in SOCKETS}


def register(socket: str) -> Callable[[Callable], Callable]:
    """Decorator: make a factory known to `socket` under its function name; returns it unchanged."""
    table = _table(socket)

    def record(factory: Callable) -> Callable:
        name = factory.__name__
        other = table.setdefault(name, factory)
        if (other.__module__, other.__qualname__) != (factory.__module__, factory.__qualname__):
            raise ValueError(
                f"{socket} {name!r}: registered by {other.__module__} and again by {factory.__module__}"
            )
        table[name] = factory
        return factory

    return record


def names(socket: str) -> tuple[str, ...]:
    """The names of all factories of `socket`, sorted."""
    _load()
    return tuple(sorted(_table(socket)))


def get(socket: str, name: str) -> Callable:
    """The factory called `name` (hyphens and underscores are the same).

    Raises ValueError for an unknown name, with the nearest ones and the list of all.
    """
    _load()
    table = _table(socket)
    key = name.strip().replace("-", "_")
    if key in table:
        return table[key]
    known = sorted(table)
    near = difflib.get_close_matches(key.lower(), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    elsewhere = [s for s in SOCKETS if key in _factories[s]]
    if elsewhere:
        hint += f"; it is registered for {' and '.join(elsewhere)}"
    raise ValueError(f"unknown {socket} {name!r}{hint}; known: {', '.join(known) or 'none'}")


def parse(socket: str, text: str) -> Any:
    """Build the record that `"name"` or `"name:arg=value,arg=value"` describes.

    Values are Python literals (`64`, `0.1`, `True`, `None`, `(1, 2)`, `'text'`); a bare word is a string.
    Raises ValueError for an unknown name, an unknown, repeated or missing argument, an unreadable value, and a value of
    another type than the factory's signature says.
    """
    name, _, tail = text.partition(":")
    return build(f"{socket} {name!r}", get(socket, name), tail)


def build(what: str, factory: Callable, text: str) -> Any:
    """Call a factory with the arguments "arg=value,arg=value", checked against its signature; `what` is its name in
    errors."""
    arguments = {key: _value(value) for key, value in given(what, text).items()}
    _check(what, factory, arguments)
    return factory(**arguments)


def given(what: str, text: str) -> dict[str, str]:
    """The arguments "arg=value,arg=value" by name, values as they are written."""
    found: dict[str, str] = {}
    for item in _split(text, text):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise ValueError(f"{what}: expected arg=value, got {item.strip()!r}")
        if key in found:
            raise ValueError(f"{what}: argument {key!r} is given twice")
        found[key] = value
    return found


def _table(socket: str) -> dict[str, Callable]:
    if socket not in _factories:
        raise ValueError(f"socket: expected one of {', '.join(SOCKETS)}, got {socket!r}")
    return _factories[socket]


@cache
def _load() -> None:
    """Import every module of every family that exists; an error in one of them is the caller's to see."""
    root = importlib.import_module("jaxattn")
    present = {module.name for module in pkgutil.iter_modules(root.__path__)}
    for family in FAMILIES:
        if family in present:
            package = importlib.import_module(f"jaxattn.{family}")
            for module in pkgutil.walk_packages(package.__path__, f"jaxattn.{family}."):
                importlib.import_module(module.name)


def _split(tail: str, text: str) -> list[str]:
    """Split at commas that are outside brackets and quotes."""
    items, start, depth, quote = [], 0, 0, ""
    for i, c in enumerate(tail):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            items.append(tail[start:i])
            start = i + 1
        if depth < 0:
            break
    if depth or quote:
        raise ValueError(f"{text!r}: brackets or quotes do not close")
    items.append(tail[start:])
    return [item for item in items if item.strip()]


def _value(word: str) -> Any:
    word = {"true": "True", "false": "False", "none": "None"}.get(word, word)
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        # A word that was meant as a container must not pass for a string.
        if word[0] in "([{'\"":
            raise ValueError(f"expected a Python literal or a bare word, got {word!r}") from None
        return word


def _check(what: str, factory: Callable, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters.values()
    accepted = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = []
    else:
        unknown = [key for key in arguments if key not in accepted]
    missing = [key for key, p in accepted.items() if p.default is p.empty and key not in arguments]
    if unknown or missing:
        wrong = f"unknown argument {unknown[0]!r}" if unknown else f"missing argument {missing[0]!r}"
        near = difflib.get_close_matches(unknown[0], accepted, n=1) if unknown else []
        wrong += f"; did you mean {near[0]}?" if near else ""
        listed = ", ".join(k if p.default is p.empty else f"{k}={p.default!r}" for k, p in accepted.items())
        raise ValueError(f"{what}: {wrong}; accepted: {listed or 'none'}")
    try:
        hints = typing.get_type_hints(factory)
    except NameError:  # names of another module's type checking
        hints = {}
    for key, value in arguments.items():
        if key in hints and not _fits(value, hints[key]):
            wanted = hints[key].__name__ if isinstance(hints[key], type) else hints[key]
            raise ValueError(f"{what}: argument {key!r}: expected {wanted}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from text is of an annotated type; types that cannot be written as text accept anything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in inner)
    if hint in (None, type(None)):
        return value is None
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is tuple or origin is tuple:
        ok = isinstance(value, (tuple, list))
        if not ok or not inner:
            return ok
        same = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(same) == len(value) and all(_fits(v, h) for v, h in zip(value, same, strict=True))
    return True
