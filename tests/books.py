"""The notebooks as the tests see them: which there are, and what is in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbb import notebook as nb
from tests.conftest import ROOT

PATHS = sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
FIGURES = ROOT / "figures"
CHECKED = "nbval-check-output"
QUICKEST = ROOT / "notebooks/02_branch_addition.ipynb"
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path):
    return nb.read(path)


def tagged(path: Path, tag: str) -> list:
    return [cell for cell in read(path).cells if tag in nb.tags(cell)]


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]
