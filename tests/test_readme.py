"""The README's examples run as they stand, in order, in one namespace."""

import re
from pathlib import Path

from jaxattn import registry

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(capsys, monkeypatch):
    for socket in registry.SOCKETS:
        registry.names(socket)  # all that come with the package, to which an example adds
        monkeypatch.setitem(registry._factories, socket, dict(registry._factories[socket]))
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 6
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)  # noqa: S102
    assert "(1, 24, 64)" in capsys.readouterr().out


def test_files_it_names_exist():
    text = README.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (README.parent / link).exists(), link
