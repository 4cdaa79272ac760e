"""systems.toml tells the truth: every entry imports, cites its source and is exercised."""

import inspect
import re
import sys
from pathlib import Path

import pytest

from jaxattn import systems

ROWS = systems.systems()
ENTRIES = [s for s in ROWS if s.entry]


def words(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def test_rows_are_complete_and_unique():
    assert [s.number for s in ROWS] == list(range(1, 198))
    assert len({s.slug for s in ROWS}) == 197
    for s in ROWS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", s.slug), s
        assert s.title and s.kinds and s.home.endswith(".py"), s
        assert s.home.split("/")[0] in ("jaxattn", "models", "train", "benchmarks", "pallas_kernels"), s
        assert not s.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", s.arxiv), s
        assert bool(s.entry) == bool(s.test), f"{s.slug}: entry and test come together"


@pytest.mark.parametrize("system", ENTRIES, ids=lambda s: s.slug)
def test_entry(system):
    assert systems.problem(system) == ""
    entry = systems.load(system)

    source = Path(inspect.getsourcefile(entry)).relative_to(systems.ROOT)
    assert str(source) == system.home, "the entry lives in another file than its home"

    doc = inspect.getdoc(entry)
    assert len(doc) >= 80, "too short to say what it does"
    # The source may be cited by the factory or, one paper being one file, by the head of the file.
    cited = words(doc + " " + (sys.modules[entry.__module__].__doc__ or ""))
    names = [words(system.title), words(system.title.partition(":")[0])]
    names += [words(system.arxiv)] if system.arxiv else []
    assert any(name in cited for name in names), f"cites none of {names}"

    if system.golden:
        vectors = list((systems.ROOT / "tests/golden").glob(f"{system.number:03d}-*/io.npz"))
        vectors += list((systems.ROOT / "tests/golden").glob(f"{system.slug}/io.npz"))
        assert vectors, "golden vectors exist for it but tests/golden has none"


def test_status_is_derived():
    row = ROWS[0].__dict__
    real = {"entry": "jaxattn.systems:systems", "test": "tests/test_systems.py::test_status_is_derived"}
    assert systems.System(**row | real).status == "works"
    for wrong in (
        {"entry": ""},
        {"entry": "jaxattn.systems:absent"},
        {"entry": "jaxattn.absent:systems"},
        {"entry": "jaxattn.systems:ROOT"},
        {"test": ""},
        {"test": "tests/test_systems.py::absent"},
        {"test": "tests/absent.py::test_entry"},
    ):
        assert systems.System(**row | real | wrong).status == "planned", wrong


def test_command_line(capsys):
    import json

    assert systems.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 197
    assert {r["slug"] for r in rows if r["status"] == "works"} == {s.slug for s in ENTRIES}
    assert systems.main([]) == 0
    assert f"{len(ENTRIES)} of 197 work" in capsys.readouterr().out


def test_markdown_is_up_to_date():
    assert (systems.ROOT / "SYSTEMS.md").read_text() == systems.markdown(), "run `make systems`"
