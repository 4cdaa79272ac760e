"""Efficient attention and token selection for JAX.

    import jaxattn as ja

    part = ja.attend(q, k, v, mask=ja.masks.causal() & (ja.masks.window(1024) | ja.masks.first(4)))
    policy = ja.cache.h2o(budget=512)

The algebra (``attend``, ``merge``, ``linear_attend``, ``masks``, ``select``, ``statistics``) lives in ``jaxattn.core``;
every other folder is a family of published methods. Names are loaded on first use.
"""

import importlib

_HOMES = {
    "attend": "core.attend", "make_call": "core.attend", "attend_call": "core.attend", "merge": "core.attend",
    "mix": "core.attend", "linear_attend": "core.linear", "linear_step": "core.linear", "Rope": "core.rope",
    "Call": "core.types", "Ctx": "core.types", "Meta": "core.types", "Need": "core.types", "Part": "core.types",
    "Selection": "core.types", "Spec": "core.types", "State": "core.types", "Tokens": "core.types",
    "View": "core.types", "contract": "core.types", "operand": "core.types", "split": "core.types",
}  # fmt: skip
_MODULES = {"masks": "core.mask", "select": "core.select", "statistics": "core.statistics", "slots": "core.slots",
            "registry": "registry"}  # fmt: skip
_FAMILIES = ("analysis", "attention", "cache", "linear", "objectives", "sparse", "steering", "tokens")

__all__ = sorted([*_HOMES, *_MODULES, *_FAMILIES])


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxattn.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"jaxattn.{_MODULES[name]}")
    if name in _FAMILIES:
        return importlib.import_module(f"jaxattn.{name}")
    raise AttributeError(f"jaxattn has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
