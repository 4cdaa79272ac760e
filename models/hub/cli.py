"""Text from a checkpoint on the command line, with and without methods:

    python -m models.generate PATH --prompt "Why is the sky blue?" --chat --cache h2o:budget=512
    python -m models.generate PATH --image photo.jpg --prompt "What is this?" --tokens hiprune:keep=64 --attention flexprefill

Every method given is run alone, and all together where there are several, after a run without any. Each is compiled in a
first, silent pass; numbers are of the second.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import registry
from models.bind import Bound, as_record
from models.generate import prefill, stream
from models.hub import images, load, multimodal
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
    p.add_argument("--image", help="a picture, for a vision-language model")
    p.add_argument("--steps", type=int, default=64, help="tokens at most (64)")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights and the computation; default: as stored")
    p.add_argument("--cache", help="a cache policy, name:arg=value,arg=value")
    p.add_argument("--attention", help="an attention or a sparse pattern, name:arg=value")
    p.add_argument("--steering", help="a steering method, name:arg=value")
    p.add_argument("--tokens", help="a token method, name:arg=value or site=name:arg=value with a site such as vision or llm.8")
    return p


def sockets_of(args, config) -> dict[str, dict]:
    """{label: sockets} of every method on the command line; ValueError names what a method does not take."""
    found = {}
    for socket in ("cache", "attention", "steering"):
        if text := getattr(args, socket):
            registry.parse(socket, text)
            found[f"{socket} {text}"] = {socket: text}
    if args.tokens:
        site, text = SITE.match(args.tokens), args.tokens
        text = text[site.end() :] if site else text
        vlm = isinstance(config, VLMConfig)
        record = as_record("tokens", text, (config.llm if vlm else config).layers)
        default = "llm" if hasattr(record, "schedule") or not vlm else "vision"
        found[f"tokens {args.tokens}"] = {"reduce": {site.group()[:-1] if site else default: text}}
    return found


def prompt_of(args, config, raw: dict, text: Text) -> dict:
    """The arguments of ``stream``: tokens and, for a vision-language model, the image and where it stands."""
    vlm = isinstance(config, VLMConfig)
    if vlm != bool(args.image):
        raise ValueError(f"--image: expected {'a picture' if vlm else 'none'} for a {raw['model_type']}, got {args.image!r}")
    content = [{"type": "image"}, {"type": "text", "text": args.prompt}] if vlm else args.prompt
    words = text.chat([{"role": "user", "content": content}]) if args.chat else args.prompt
    if not vlm:
        return {"tokens": text.batch([words], special=not args.chat)[0]}
    from PIL import Image

    token = raw.get("image_token_index", raw.get("image_token_id"))
    name = text.tokenizer.id_to_token(token)
    words = words if name in words else f"{name}\n{words}"
    tokens, _, image_at = multimodal.place_image(text.batch([words], special=not args.chat)[0], token)
    picture = images.prepare(Image.open(args.image), images.read_processor(args.path))
    return {"tokens": tokens, "image": jnp.asarray(picture)[None], "image_at": image_at}


def run(label: str, bound: Bound, prompt: dict, text: Text, steps: int, dtype, out) -> Run:
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
    state = jax.eval_shape(lambda: prefill(bound, **prompt, max_new=steps, dtype=dtype))[1]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.caches))
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


def main(argv: list[str] | None = None, out=None) -> list[Run]:
    """Runs the command line; returns what the table shows."""
    out = sys.stdout if out is None else out
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.steps < 1:
            raise ValueError(f"--steps: expected at least 1, got {args.steps}")
        text = read_text(args.path)
        bound, raw = load.from_pretrained(args.path, dtype=args.dtype)
        config = bound.program.config
        if not isinstance(config, LLMConfig | VLMConfig):
            raise ValueError(f"path: expected a model that writes text, got a {raw['model_type']}")
        methods = sockets_of(args, config)
        prompt = prompt_of(args, config, raw, text)
        ways = {"without methods": {}, **methods}
        if len(methods) > 1:
            ways["all together"] = {k: v for sockets in methods.values() for k, v in sockets.items()}
        family = load.FAMILIES[raw["model_type"]].model
        models = {label: family.bind(config, bound.params, **{"cache": "full", **sockets}) for label, sockets in ways.items()}
    except (ValueError, OSError, ImportError) as error:
        p.error(str(error))
    dtype = None if args.dtype is None else np.dtype(jnp.dtype(args.dtype))
    runs = []
    for label, model in models.items():
        out.write(f"--- {label}\n")
        runs.append(run(label, model, prompt, text, args.steps, dtype, out))
    out.write(f"\n{table(runs)}\n")
    return runs
