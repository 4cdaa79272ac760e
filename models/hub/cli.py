"""Text from a checkpoint on the command line, with and without methods:

    python -m models.generate PATH --prompt "Why is the sky blue?" --chat --cache h2o:budget=512
    python -m models.generate PATH --image photo.jpg --prompt "What is this?" --tokens hiprune:keep=64 --attention flexprefill
    python -m models.generate PATH --image a.jpg --image b.jpg --prompt "<image> or <image>?" --tokens llm.8=uniform:keep=32

A run without methods comes first, then each method alone, then all of them together where no two are rivals for one place
(two caches, two attentions, two token methods at one site). All are checked against the model and the prompt before the
first runs. Each way is compiled in a first, silent pass (the prompt and one step); what is timed and printed is a second
one. Mistakes end with one line and exit code 2, ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import registry
from models import lora
from models.bind import Bound, as_record
from models.generate import decode, prefill, stream
from models.hub import adapters, images, load, multimodal
from models.hub.text import Text, read_text
from models.language.llm import LLMConfig
from models.multimodal.vlm import VLMConfig

SITE = re.compile(r"(vision|project|llm)(\.\d+)?=")
DTYPES = ("float32", "bfloat16", "float16")


class Run(NamedTuple):
    """What one way of generating gave: seconds to the first token, tokens per second behind it, bytes of its cache."""

    label: str
    ids: list[int]
    first: float
    rate: float
    cache: int


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("models.generate", description="Text from a local checkpoint, with and without methods.")
    p.add_argument("path", help="directory with config.json, *.safetensors and tokenizer.json")
    p.add_argument("--prompt", required=True, help="what to continue, or to answer with --chat")
    p.add_argument("--chat", action="store_true", help="render the prompt with the checkpoint's chat template")
    p.add_argument("--image", help="a picture, for a vision-language model; several in the order of the prompt's image tokens "
                   "(where it has none, they come first)", action="append", default=[])  # fmt: skip
    p.add_argument("--steps", type=int, default=64, help="tokens at most (64)")
    p.add_argument("--part", help="one part of a model that has several: text of a gemma3")
    p.add_argument("--adapter", help="a directory of adapters in PEFT's layout, beside the checkpoint's weights")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights and the computation; default: as stored")
    many = dict(action="append", default=[])
    p.add_argument("--cache", help="a cache policy, name:arg=value,arg=value; this and the following may be repeated", **many)
    p.add_argument("--attention", help="an attention or a sparse pattern, name:arg=value", **many)
    p.add_argument("--steering", help="a steering method, name:arg=value", **many)
    p.add_argument("--tokens", help="a token method, name:arg=value or site=name:arg=value with a site such as vision or llm.8",
                   **many)  # fmt: skip
    return p


def sockets_of(args, config) -> dict[str, dict]:
    """{label: sockets} of every method on the command line; ValueError names what a method does not take."""
    found = {}
    for socket in ("cache", "attention", "steering"):
        for text in getattr(args, socket):
            registry.parse(socket, text)
            found[f"{socket} {text}"] = {socket: text}
    for given in args.tokens:
        site = SITE.match(given)
        text = given[site.end() :] if site else given
        vlm = isinstance(config, VLMConfig)
        record = as_record("tokens", text, (config.llm if vlm else config).layers)
        if not vlm and getattr(record, "acts_on", "vision") == "vision":
            raise ValueError(f"--tokens {given}: expected a vision-language model, it acts on the rows of pictures")
        default = "llm" if hasattr(record, "schedule") or not vlm else "vision"
        default = getattr(record, "place", default) if vlm else default
        found[f"tokens {given}"] = {"reduce": {site.group()[:-1] if site else default: text}}
    return found


def together(methods: dict[str, dict]) -> dict | None:
    """The sockets of all methods at once; None where two of them want one place."""
    joined: dict = {"reduce": {}, "steering": ()}
    for sockets in methods.values():
        for socket, value in sockets.items():
            if socket == "steering":
                joined[socket] += (value,)
                continue
            slots, more = (joined["reduce"], value) if socket == "reduce" else (joined, {socket: value})
            if slots.keys() & more.keys():
                return None
            slots.update(more)
    return {socket: value for socket, value in joined.items() if value}


def _chat(text: Text, content) -> str:
    try:
        return text.chat([{"role": "user", "content": content}])
    except (ValueError, ImportError):
        raise
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"--chat: the checkpoint's template refused the prompt: {error}") from None


def prompt_of(args, config, raw: dict, text: Text) -> dict:
    """The arguments of ``stream``: tokens and, for a vision-language model, the image and where it stands."""
    vlm = isinstance(config, VLMConfig)
    if vlm != bool(args.image):
        wanted = "a picture" if vlm else "none"
        raise ValueError(f"--image: expected {wanted} for a {raw['model_type']}, got {args.image or None}")
    kinds = [{"type": "image"} for _ in args.image]
    content = [*kinds, {"type": "text", "text": args.prompt}] if vlm else args.prompt
    words = _chat(text, content) if args.chat else args.prompt
    if not vlm:
        return {"tokens": text.batch([words], special=not args.chat)[0]}
    known = {**load.FAMILIES[raw["model_type"]].defaults, **raw}
    token = known.get("image_token_index", known.get("image_token_id"))
    name = text.tokenizer.id_to_token(token)
    if name is None:
        raise ValueError(f"path: expected a tokenizer with the image token {token} of config.json")
    words = words if name in words else name * len(args.image) + f"\n{words}"
    fields = images.read_processor(args.path)
    grid = tuple(map(tuple, fields["image_grid_pinpoints"] or ()))
    if grid != config.pinpoints:
        raise ValueError(f"path: image_grid_pinpoints: expected the model's {config.pinpoints}, the processor has {grid}")
    seen = [images.crops(images.read_picture(file), fields) for file in args.image]
    tokens = text.batch([words], special=not args.chat)[0]
    marks = int((tokens == token).sum())
    if marks != len(seen):
        raise ValueError(f"--prompt: expected {len(seen)} {name}, one for each --image, got {marks}")
    tokens, _, found = multimodal.place_pictures(config, tokens, token, [seen])
    return {"tokens": tokens, "image": jax.tree.map(jnp.asarray, found)}


def cache_bytes(bound: Bound, prompt: dict, steps: int, dtype) -> int:
    """Of all layers together, behind the prompt and with room for ``steps``; nothing is computed. What a method refuses shows
    here, at the prompt or the next token."""

    def say():
        state = prefill(bound, **prompt, max_new=steps, dtype=dtype)[1]
        return state.caches, decode(bound, state, dtype=dtype)[0]

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(say)[0]))


def run(label: str, bound: Bound, prompt: dict, text: Text, steps: int, dtype, size: int, out) -> Run:
    """Generate twice; the second pass is timed and written to ``out`` as it comes."""
    for i, _ in enumerate(stream(bound, **prompt, steps=steps, dtype=dtype)):  # compiles the prefill and a step
        if i == 1:
            break
    ids: list[int] = []
    shown, began, first = "", time.perf_counter(), 0.0
    for token in stream(bound, **prompt, steps=steps, dtype=dtype):
        ids.append(int(token[0]))
        first = first or time.perf_counter() - began
        if ids[-1] in text.stop:
            break
        now = text.decode(ids)
        if not now.endswith("\ufffd"):  # else a character that is not whole yet
            out.write(now[len(shown) :])
            out.flush()
            shown = now
    seconds = time.perf_counter() - began - first
    out.write("\n")
    return Run(label, ids, first, (len(ids) - 1) / seconds if len(ids) > 1 else 0.0, size)


def table(runs: list[Run]) -> str:
    """One line per run; the last column counts the tokens that agree with the first run before the texts part."""
    rows = [("", "first token", "tokens/s", "cache", "same tokens")]
    for r in runs:
        pairs = zip(r.ids, runs[0].ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(r.ids), len(runs[0].ids)))
        cells = (f"{r.first * 1e3:.0f} ms", f"{r.rate:.1f}", f"{r.cache / 1e6:.2f} MB", f"{same} of {len(r.ids)}")
        rows.append((r.label, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
                     for row in rows)  # fmt: skip


def main(argv: list[str] | None = None, out=None, mesh=None) -> list[Run]:
    """Runs the command line, on the devices of ``mesh`` where there is one; returns what the table shows."""
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        return _main(argv, sys.stdout if out is None else out, mesh)


def _main(argv: list[str] | None, out, mesh) -> list[Run]:
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.steps < 1:
            raise ValueError(f"--steps: expected at least 1, got {args.steps}")
        text = read_text(args.path)
        bound, raw = load.from_pretrained(args.path, dtype=args.dtype, mesh=mesh, part=args.part)
        if args.adapter:
            bound = bound._replace(params=lora.attach(bound.params, *adapters.load_adapter(bound, args.adapter)))
        config = bound.program.config
        if not isinstance(config, LLMConfig | VLMConfig):
            raise ValueError(f"path: expected a model that writes text, got a {raw['model_type']}")
        methods = sockets_of(args, config)
        prompt = prompt_of(args, config, raw, text)
        ways = {"without methods": {}, **methods}
        if len(methods) > 1 and (every := together(methods)):
            ways["all together"] = every
        family = load.family_for(raw, args.part)[0].model
        models = {label: family.bind(config, bound.params, **{"cache": "full", **sockets}) for label, sockets in ways.items()}
        dtype = None if args.dtype is None else np.dtype(jnp.dtype(args.dtype))
        sizes = {label: cache_bytes(model, prompt, args.steps, dtype) for label, model in models.items()}
    except (ValueError, OSError, ImportError) as error:
        p.error(str(error))
    runs = []
    try:
        for label, model in models.items():
            out.write(f"--- {label}\n")
            runs.append(run(label, model, prompt, text, args.steps, dtype, sizes[label], out))
    except KeyboardInterrupt:
        p.exit(130, "\n")
    out.write(f"\n{table(runs)}\n")
    return runs
