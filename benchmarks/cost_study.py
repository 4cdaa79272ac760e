"""python -m benchmarks cost: what token methods cost and save in a model of LLaVA-1.5-7B's size, from shapes alone."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and cache of every token method in a model of LLaVA-1.5-7B's size, from shapes alone.

    A study of the same day is continued: rows that its file has are not counted again."""

    methods: tuple[str, ...] = ()
    """Token methods as "name" or "name:arg=value,..."; none: all of the registry."""
    budgets: tuple[int, ...] = (192, 128, 64)
    """Visual tokens per layer of a picture of one crop, of 576; of 2,880 five times as many."""
    crops: tuple[int, ...] = (1, 5)
    """1: a picture of 576 tokens; 5: one of 2,880."""
    out: Path = Path("benchmarks/results")


def run(options: Cost) -> int:
    # Imported here, so that --help answers at once and other boards may still choose their devices.
    import jax

    from benchmarks.boards import llava
    from jaxattn import registry

    methods = options.methods or registry.names("tokens")
    for method in options.methods:
        registry.get("tokens", method.partition(":")[0])  # a wrong name is an error before any trace
    day = date.today().isoformat()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{day}-tokens-cost"
    known = json.loads(path.with_suffix(".json").read_text())["rows"] if path.with_suffix(".json").exists() else []
    for found in llava.study(methods, options.budgets, options.crops, known, lambda text: print(text, flush=True)):
        path.with_suffix(".json").write_text(json.dumps({"date": day, "jax": jax.__version__, **found}, indent=1) + "\n")
    path.with_suffix(".md").write_text(llava.markdown(found, day))
    print(f"wrote {path}.md and .json: {len(found['rows'])} rows")
    return 0
