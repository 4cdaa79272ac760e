"""Tokenizers and chat templates of a checkpoint directory: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxattn.core.types import expect


class Text(NamedTuple):
    """A tokenizer with what its directory says beside it.

    tokens: {"bos_token": ...} as text.  templates: {name: jinja source}.  stop: token ids that end a text.
    """

    tokenizer: Tokenizer
    tokens: dict[str, str]
    templates: dict[str, str]
    stop: tuple[int, ...]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the tokenizer puts around a text (a rendered chat has it already)."""
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids, *, special: bool = False) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)

    def batch(self, texts: list[str], *, special: bool = True, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [B, T] right-padded, lengths int32 [B])."""
        rows = [self.encode(text, special=special) for text in texts]
        expect("texts", len(rows), "at least one, none of them empty", len(rows) > 0 and all(rows))
        ids = np.full((len(rows), max(map(len, rows))), pad, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return ids, np.array([len(row) for row in rows], np.int32)

    def chat(self, messages: list[dict], *, prompt: bool = True, template: str = "default", **values: Any) -> str:
        """Messages [{"role": ..., "content": ...}] as the text that the model was trained on.

        prompt: end where the assistant begins.  template: its name, where there are several.  values: what else it reads.
        """
        if template not in self.templates:
            known = sorted(self.templates) or "none, the directory has no chat template"
            raise ValueError(f"template: expected one of {known}, got {template!r}")
        return render(self.templates[template], messages=messages, add_generation_prompt=prompt, **{**self.tokens, **values})


def read_text(path: str | Path) -> Text:
    """The tokenizer of a local checkpoint directory. Raises ValueError where there is no tokenizer.json."""
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"path: expected tokenizer.json in {folder} (other tokenizer formats are not read)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"{file}: not a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _json(folder / "tokenizer_config.json")
    named = {**_json(folder / "special_tokens_map.json"), **config}
    tokens = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()
              if k.endswith("_token") and isinstance(v, str | dict)}  # fmt: skip
    return Text(tokenizer, tokens, _templates(folder, config), _stop(folder, tokenizer, tokens))


def _json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}


def _templates(folder: Path, config: dict) -> dict[str, str]:
    found = config.get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    legacy = _json(folder / "chat_template.json").get("chat_template")
    found = {**found, **({"default": legacy} if legacy else {})}
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return {**found, **{name: file.read_text() for name, file in files.items() if file.is_file()}}


def _stop(folder: Path, tokenizer: Tokenizer, tokens: dict) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    found = tokenizer.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
    return () if found is None else (found,)


def render(source: str, **values: Any) -> str:
    """A chat template, as transformers renders it: sandboxed, blocks trimmed, with ``raise_exception``, ``strftime_now`` and
    an unescaped ``tojson``."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install jinja2") from None

    class Generation(Extension):
        """{% generation %} marks the assistant's words; it prints what it encloses."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return env.from_string(source).render(**values)
