"""The published systems this library is built to hold: `python -m jaxattn.systems`.

The rows are in `systems.toml`. Whether a system works is derived, not stored: its entry point imports, is
documented, and its test exists.
"""

import argparse
import ast
import importlib
import json
import sys
import tomllib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()


@dataclass(frozen=True)
class System:
    """One row: see the head of systems.toml for the fields."""

    number: int
    slug: str
    title: str
    kinds: tuple[str, ...]
    arxiv: str
    home: str
    entry: str
    test: str
    board: str
    golden: bool

    @property
    def status(self) -> str:
        return "planned" if problem(self) else "works"


@cache
def systems() -> tuple[System, ...]:
    """All rows, by number."""
    rows = tomllib.loads((PACKAGE / "systems.toml").read_text())["system"]
    made = (System(**row | {"kinds": tuple(row["kinds"])}) for row in rows)
    return tuple(sorted(made, key=lambda system: system.number))


def load(system: System):
    """The entry point itself; raises ImportError or AttributeError where there is none to load."""
    module, _, name = system.entry.partition(":")
    return getattr(importlib.import_module(module), name)


def problem(system: System) -> str:
    """Why the system does not count as working, or an empty string."""
    if not system.entry:
        return "no entry"
    try:
        entry = load(system)
    except (ImportError, AttributeError, ValueError) as error:
        return f"entry {system.entry} does not load: {error}"
    if not (callable(entry) and (entry.__doc__ or "").strip()):
        return f"entry {system.entry} is not a documented function"
    # Tests belong to the checkout; an installed package cannot look for them.
    if IS_CHECKOUT and not has_test(system.test):
        return f"test {system.test or '(none)'} does not exist"
    return ""


def has_test(test: str) -> bool:
    """Whether "tests/path.py::function" names a test function of the checkout."""
    path, _, name = test.partition("::")
    return bool(name) and name.rpartition("::")[2] in _functions(ROOT / path)


@cache
def _functions(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    tree = ast.walk(ast.parse(path.read_text()))
    return frozenset(node.name for node in tree if isinstance(node, ast.FunctionDef))


def markdown() -> str:
    """The text of SYSTEMS.md."""
    rows = systems()
    status = {s.number: s.status for s in rows}
    works = sum(v == "works" for v in status.values())
    lines = [
        "# Systems",
        "",
        "Made by `make systems` from `jaxattn/systems.toml`. A system works when its entry point imports,",
        f"is documented and has a test. {works} of {len(rows)} work.",
        "",
        "| | system | paper | kinds | status | where |",
        "|---|---|---|---|---|---|",
    ]
    for s in rows:
        paper = f"{s.title} ([{s.arxiv}](https://arxiv.org/abs/{s.arxiv}))" if s.arxiv else s.title
        done = status[s.number] == "works"
        where = f"[`{s.entry}`]({s.home})" if done else f"`{s.home}`"
        paper = paper.replace("|", "\\|")
        lines.append(
            f"| {s.number:03d} | {s.slug} | {paper} | {', '.join(s.kinds)} | {status[s.number]} | {where} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m jaxattn.systems", description="The systems and what works.")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="for programs")
    output.add_argument("--markdown", action="store_true", help="write SYSTEMS.md of this checkout")
    arguments = parser.parse_args(argv)

    if arguments.json:
        rows = [asdict(s) | {"status": s.status} for s in systems()]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif arguments.markdown:
        if not IS_CHECKOUT:
            sys.exit("--markdown writes into a checkout; this is an installed package")
        (ROOT / "SYSTEMS.md").write_text(markdown())
    else:
        _print_table()
    return 0


def _print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "system", "kinds", "status", "home"):
        # A narrow terminal folds the long columns; number and status stay whole.
        table.add_column(column, no_wrap=column in ("", "status"), overflow="fold")
    rows = [(s, problem(s)) for s in systems()]
    for s, why in rows:
        status = "planned" if why else "[green]works[/green]"
        table.add_row(f"{s.number:03d}", s.slug, ", ".join(s.kinds), status, s.home)
    console = Console()
    console.print(table)
    for s, why in rows:
        if why and s.entry:
            console.print(f"[yellow]{s.slug}[/yellow]: {why}", highlight=False)
    console.print(f"{sum(not why for _, why in rows)} of {len(rows)} work")


if __name__ == "__main__":
    sys.exit(main())
