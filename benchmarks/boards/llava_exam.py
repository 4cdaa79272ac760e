"""The board on one's own: a LLaVA checkpoint from disk, and pictures with questions. What is counted is whether the greedy
answer is the expected one."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.boards import outcomes, token_page
from benchmarks.boards.budgets import Entry, Unfit
from benchmarks.boards.cost import array_bytes, traced
from jaxattn.core.types import expect
from models.bind import Bound
from models.generate import generate, prefill
from models.hub import images, load, multimodal
from models.hub.text import Text, read_text
from models.multimodal import vlm
from train.data.files import data_error, existing
from train.data.folders import KEYS, json_lines, question_image


@dataclasses.dataclass(frozen=True)
class Asked:
    """Pictures [S, H, W, 3] with a question each. words int32 [S, T] right-padded, lengths int32 [S], at int32 [S]: words in
    front of the picture; answers and kinds, S of each."""

    pictures: np.ndarray
    words: np.ndarray
    lengths: np.ndarray
    at: np.ndarray
    answers: tuple[str, ...]
    kinds: tuple[str, ...]

    def batch(self, start: int, size: int) -> dict[str, Any]:
        """Arguments of ``generate``; a last batch is filled with its last row."""
        rows = np.minimum(np.arange(start, start + size), len(self.answers) - 1)
        return {"tokens": self.words[rows], "image": jnp.asarray(self.pictures[rows]), "lengths": self.lengths[rows],
                "image_at": self.at[rows]}  # fmt: skip


def read_questions(data: Path) -> list[dict[str, str]]:
    """Lines of a jsonl: image (path relative to the file), question, answer and optionally kind, all text. Raises ValueError
    with the number of a bad line."""
    expected = "a jsonl of image, question, answer"
    path, found = existing(data, expected), []
    for where, record in json_lines(path, expected):
        record = {"kind": "all", **record} if isinstance(record, dict) else {}
        image = question_image(path, where, record, (*KEYS, "kind"))
        found.append({**record, "image": str(image)})
    if not found:
        raise data_error(path, "at least one question", "none")
    return found


def same(said: str, wanted: str) -> bool:
    """Exact match, apart from case, space around it and a full stop at the end."""
    clean = lambda x: x.strip().rstrip(".").strip().casefold()  # noqa: E731
    return clean(said) == clean(wanted)


def prompt_of(text: Text, template: str | None, question: str, mark: str) -> tuple[str, bool]:
    """(the prompt with the picture's mark, whether the tokenizer adds its special tokens)."""
    if template is not None:
        expect("prompt", repr(template), "a text with {question}", "{question}" in template)
        template = template if "{image}" in template else "{image}" + template
        return template.replace("{image}", mark).replace("{question}", question), True
    if text.templates:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        words = text.chat([{"role": "user", "content": content}])
        if mark in words:
            return words, False
    return f"{mark}\n{question}", True


def asked(path: Path, bound: Bound, raw: dict, text: Text, records: Sequence[dict], template: str | None) -> Asked:
    token = {**load.FAMILIES[raw["model_type"]].defaults, **raw}.get("image_token_index", raw.get("image_token_id"))
    mark = text.tokenizer.id_to_token(token)
    expect("model", f"no token {token}", "a tokenizer with the image token of config.json", mark is not None)
    prompts = [prompt_of(text, template, r["question"], mark) for r in records]
    ids, lengths = text.batch([p for p, _ in prompts], special=prompts[0][1])
    words, lengths, at = multimodal.place_image(ids, token, lengths)
    fields = images.read_processor(path)
    pictures = np.concatenate([images.crops(images.read_picture(r["image"]), fields)[0] for r in records])
    return Asked(pictures, words, lengths, at, tuple(r["answer"] for r in records), tuple(r["kind"] for r in records))


def run(options) -> int:
    """``python -m benchmarks tokens --model PATH --data FILE``."""
    from benchmarks.tokens import Progress, planned, say

    records, text = read_questions(options.data), read_text(options.model)
    bound, raw = load.from_pretrained(options.model, cache="full")
    c = bound.program.config
    plain = isinstance(c, vlm.VLMConfig) and not c.pinpoints and c.vision.merge == 1
    expect("model", raw["model_type"], "a llava (1.5) model, which reads a picture as one crop", plain)
    entries, unfit = planned(options, c)
    questions = asked(options.model, bound, raw, text, records, options.prompt)
    names = tuple(dict.fromkeys(questions.kinds))
    exam = outcomes.Exam(names, names, np.array([[[k == n] for k in questions.kinds] for n in names]))
    store = outcomes.Store(options.out / "results")
    where = {"checkpoint": options.model.name, "identity": str(options.model.resolve()), "prompt": options.prompt,
             "data": [[r[k] for k in ("image", "question", "answer", "kind")] for r in records], "new": options.new,
             "batch": options.batch, "rounds": options.rounds}  # fmt: skip
    found, costs, refused, progress = {}, {}, [], Progress(len(entries))
    full = entry_model(entries[0], bound)
    for e in entries:
        key = {"what": "llava", **outcomes.entry_key(e), **where}
        kept = store.load(key)
        if kept is None:
            try:
                model = entry_model(e, bound)
                outcome = examine(model, text, questions, options.batch, options.new)
                cost = costs_of(model, full, questions, options.batch, options.new, options.rounds)
            except ValueError as error:
                refused.append(Unfit(e.method, e.budget, str(error).splitlines()[0]))
                progress(f"{e.label}  refused: {refused[-1].reason}")
                continue
            kept = {"outcome": outcome.as_json(), "cost": cost}
            store.save(key, kept)
        found[e.label, where["checkpoint"]], costs[e.label] = outcomes.Outcome.of_json(kept["outcome"]), kept["cost"]
        progress(e.label)
    name = f"{datetime.date.today().isoformat()}-tokens-{options.model.name}"
    facts = {"checkpoints": [where["checkpoint"]], "images": len(records), "tokens": c.visual, "layers": c.llm.layers,
             "positions": options.positions, "batch": options.batch, "title": f"Visual tokens of {options.model.name}",
             "about": f"Exact matches of the greedy answers to {len(records)} questions of {options.data.name}"}  # fmt: skip
    token_page.write(options.report / name, entries, found, costs, [*unfit, *refused], exam, facts)
    say((options.report / f"{name}.md").read_text())
    return 0


def entry_model(e: Entry, bound: Bound) -> Bound:
    """The checkpoint with the entry's methods, caching."""
    return vlm.bind(bound.program.config, bound.params, reduce=dict(e.reduce), cache="full")


def examine(model: Bound, text: Text, questions: Asked, size: int, new: int) -> outcomes.Outcome:
    """Every question answered greedily with at most ``new`` tokens."""
    right = []
    for start in range(0, len(questions.answers), size):
        rows = generate(model, **questions.batch(start, size), steps=new, stop=text.stop[0] if text.stop else None)
        for row, wanted in zip(np.asarray(rows), questions.answers[start : start + size], strict=False):
            ends = np.flatnonzero(np.isin(row, text.stop))
            right.append(same(text.decode(row[: ends[0]] if len(ends) else row), wanted))
    return outcomes.Outcome(np.array(right)[:, None])


def costs_of(model: Bound, full: Bound, questions: Asked, size: int, new: int, rounds: int) -> dict[str, Any]:
    """Products and cache of a prompt, and times as shares of the full model's: one new token, and each further one."""
    batch = questions.batch(0, size)
    state = functools.partial(prefill, max_new=new)
    parts, shapes = traced(lambda batch: state(model, **batch)[1].caches, batch)
    found = {"flops": sum(p.matmul for p in parts.values()) / size, "cache": array_bytes(shapes) / size, "prefill": None,
             "decode": None, "batch": size}  # fmt: skip
    if not rounds:
        return found
    seconds: dict[tuple[bool, int], list[float]] = {(mine, n): [] for mine in (False, True) for n in (1, new)}
    order = list(seconds)
    for number in range(rounds + 1):  # the first round compiles
        for i in np.roll(np.arange(len(order)), number):
            mine, steps = order[i]
            began = time.perf_counter()
            jax.block_until_ready(generate(model if mine else full, **batch, steps=steps))
            if number:
                seconds[order[i]].append(time.perf_counter() - began)
    first, last = ({mine: np.array(seconds[mine, n]) for mine in (False, True)} for n in (1, new))
    found |= {"prefill": float(np.median(first[True] / first[False])), "full_prefill": float(np.median(first[False]))}
    if new > 1:
        step = {mine: float(np.median(last[mine] - first[mine])) / (new - 1) for mine in (False, True)}
        found |= {"decode": step[True] / step[False] if step[False] > 0 else None, "full_decode": step[False]}
    return found


