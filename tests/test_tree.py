"""The shape of the tree: imports point downwards, machinery is written once, files are small and finished."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("pallas_kernels", "jaxattn", "models", "train", "benchmarks")
FAMILIES = (
    *("attention", "sparse", "spatial", "linear", "experts", "mixers", "pooling", "fusion"),
    *("tokens", "cache", "steering", "analysis", "objectives", "quantize", "vocabulary"),
)
FILES = sorted(path for top in CODE for path in (ROOT / top).rglob("*.py"))

# Longer than 500 lines, and why one file is still one room.
LONG: dict[str, str] = {}
LIMIT = 500

MACHINERY = re.compile(r"_?(top_k|topk|softmax|rope|apply_rope|rotate|rotary|gather_tokens)")
UNFINISHED = re.compile(
    r"/work/|/home/|/root/|/tmp/|\bTODO\b|\bFIXME\b|\bXXX\b|(?i:\bplaceholder\b)|NotImplementedError"
)
# Maps of queries x keys that are small by construction: "path:function" and what bounds them.
SMALL_MAPS: dict[str, str] = {}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """The project modules that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if base.split(".")[0] in CODE and is_module(inner) else base)
    return {m for m in found if m.split(".")[0] in CODE}


def layer(module: str) -> tuple[int, str]:
    """(height, room): a module may import lower layers and its own room, not its siblings'."""
    top, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    if top == "pallas_kernels":
        return 0, top
    if top == "jaxattn":
        if room == "core":
            return 1, room
        if room == "registry":
            return 2, room
        if room in FAMILIES:
            return 3, room
        if room == "nn":
            return 4, room
        return 5, "jaxattn"  # the package itself and its command-line modules see the whole library
    return 6 + ("models", "train", "benchmarks").index(top), top


def broken_imports(tree: ast.Module, module: str, is_package: bool = False) -> list[str]:
    height, room = layer(module)
    broken = []
    for target in sorted(imports(tree, module, is_package)):
        # `import jaxattn` from inside the library would import everything above the file.
        other_height, other_room = layer(target)
        if room != other_room and other_height >= height:
            broken.append(f"{module} imports {target}")
    return broken


def test_the_tree_is_found():
    tops = {name(path).split("/")[0] for path in FILES}
    assert {"pallas_kernels", "jaxattn"} <= tops
    assert any(name(path).startswith("jaxattn/core/") for path in FILES)
    rooms = {p.name for p in (ROOT / "jaxattn").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= {"core", "nn", *FAMILIES}, "a new folder of jaxattn needs a layer here"


def test_imports_point_downwards():
    broken = []
    for path in FILES:
        broken += broken_imports(parse(path), module_of(path), path.name == "__init__.py")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "module, source",
    [
        ("jaxattn.core.mask", "from jaxattn import tokens"),
        ("jaxattn.core.mask", "from ..registry import register"),
        ("jaxattn.core.mask", "import jaxattn"),
        ("jaxattn.tokens.aim", "def f():\n    from jaxattn.cache import h2o"),
        ("jaxattn.tokens.aim", "from ..cache.h2o import h2o"),
        ("jaxattn.tokens.aim", "from jaxattn import nn"),
        ("jaxattn.nn.block", "import models.generate"),
        ("models.generate", "from train import loop"),
        ("train.loop", "import benchmarks"),
        ("pallas_kernels.flash.xla", "from jaxattn.core import types"),
    ],
)
def test_upward_imports_are_seen(module, source):
    assert broken_imports(ast.parse(source), module)


@pytest.mark.parametrize(
    "module, source",
    [
        ("jaxattn.core.attend", "from pallas_kernels import _compat\nfrom .types import Call\nimport jax"),
        ("jaxattn.tokens.aim", "from jaxattn.registry import register\nfrom ..core import select"),
        ("jaxattn.tokens.aim", "from . import hiprune"),
        ("benchmarks.cli", "import jaxattn as ja\nfrom models import generate\nfrom train import loop"),
    ],
)
def test_downward_imports_pass(module, source):
    assert not broken_imports(ast.parse(source), module)


def test_families_write_no_machinery():
    """Top-k, softmax, rotary embedding and gather live in core, once."""
    again = [
        f"{name(path)}:{node.lineno} defines {node.name}"
        for path in FILES
        if name(path).split("/")[0] == "jaxattn" and name(path).split("/")[1] in FAMILIES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef) and MACHINERY.fullmatch(node.name)
    ]
    assert not again, "\n".join(again)


def test_files_stay_small():
    lines = {name(path): len(path.read_text().splitlines()) for path in FILES}
    long = {path: n for path, n in lines.items() if n > LIMIT}
    assert not (extra := long.keys() - LONG.keys()), f"over {LIMIT} lines: {sorted(extra)}"
    assert not (stale := LONG.keys() - long.keys()), f"no longer over {LIMIT} lines: {sorted(stale)}"


def is_map(subscripts: str) -> bool:
    """Whether every query row meets every key row: both operands batched, their last axis summed."""
    inputs, arrow, out = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or min(map(len, terms)) < 3:
        return False
    a, b = terms
    summed = a[-1] == b[-1] and a[-1] not in out
    return summed and a[0] == b[0] and bool(set(a) - set(b)) and bool(set(b) - set(a))


def maps_in(tree: ast.Module) -> list[tuple[str, int, str]]:
    """(function, line, subscripts) of the maps outside functions named as references, tiles or chunks."""
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            if re.search("reference|tile|chunk", node.name):
                return
            function = node.name
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "einsum" and node.args:
            text = node.args[0]
            if isinstance(text, ast.Constant) and is_map(str(text.value)):
                found.append((function, node.lineno, text.value))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return found


def test_no_map_outside_references():
    """A first look only: the jaxpr tests of core count elements; core, where tiles are made, is theirs."""
    maps = [
        f"{name(path)}:{line} in {function}: {subscripts}"
        for path in FILES
        if not name(path).startswith(("pallas_kernels/", "jaxattn/core/"))
        for function, line, subscripts in maps_in(parse(path))
        if f"{name(path)}:{function}" not in SMALL_MAPS
    ]
    assert not maps, "\n".join(maps)


def test_maps_are_seen():
    source = "def {}(q, k):\n    return jnp.einsum('{}', q, k)"
    for subscripts in ("bqhd,bkhd->bhqk", "bhqd, bhkd -> bhqk", "bnd,bmd->bnm"):
        assert maps_in(ast.parse(source.format("f", subscripts)))
        assert not maps_in(ast.parse(source.format("attend_reference", subscripts)))
    for subscripts in ("bnhf,bnhe->bhfe", "bnd,de->bne", "bnhd,hed->bnhe", "bhqk,bkhd->bqhd"):
        assert not maps_in(ast.parse(source.format("f", subscripts)))


def test_code_is_finished_and_portable():
    found = [
        f"{name(path)}:{i}: {line.strip()}"
        for path in FILES
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not found, "\n".join(found)
