"""python -m benchmarks prefill: what fewer visual tokens save on this machine, and what choosing them takes."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Times of prefills with fewer visual tokens: the saving, schedules against their token counts, the cost of choosing."""

    schedules: tuple[str, ...] = ("fastv", "pyramiddrop", "transprune", "adaptinfer")
    """Methods that act inside the language model, at ``average`` tokens per layer."""
    choosers: tuple[str, ...] = ("fastervlm", "vtc_cls", "hiprune", "visiondrop", "holov")
    """Attention-based methods in front of the language model, at ``keep`` tokens."""
    keep: int = 64
    average: int = 192
    words: int = 32
    dim: int = 512
    """Width of the language model."""
    layers: int = 8
    vision_dim: int = 256
    vision_layers: int = 6
    repeats: int = 7
    out: Path | None = None
    """Folder for <date>-tokens-prefill.md and .json; None: only print."""


def run(options: Prefill) -> int:
    from benchmarks.boards.prefill import figures, page  # here, so that --help answers at once

    found = figures(options, lambda text: print(text, flush=True))
    text = page(options, found)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{date.today().isoformat()}-tokens-prefill"
        path.with_suffix(".md").write_text(text)
        settings = {k: v for k, v in dataclasses.asdict(options).items() if k != "out"}
        path.with_suffix(".json").write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")
        print(f"wrote {path}.md and .json")
    return 0
