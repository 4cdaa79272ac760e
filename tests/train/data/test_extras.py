"""The data extra is optional: importing needs neither library, using what needs one says which to install."""

import subprocess
import sys

import pytest

from train.data import digits, files


def test_importing_the_package_imports_neither():
    code = "import sys, train.data; print(sorted({'sklearn', 'PIL', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "library, module, use",
    [
        ("scikit-learn", "sklearn.datasets", lambda: digits._table.__wrapped__()),
        ("Pillow", "PIL", files.pillow),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library, module, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{library}: pip install 'jaxattn\[data\]'"):
        use()
