"""Tiny notebooks, for the tests of what runs them."""

from __future__ import annotations

from pathlib import Path

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import dbb
from dbb import notebook as nb

PARAMETERS = 'profile = "quick"\nseed = 0'
FIGURE = """from matplotlib import pyplot as plt
from dbb.figures import show
fig, axes = plt.subplots(layout="constrained")
_ = axes.plot([1, 2, 4])
show(fig, "{name}", "a line that rises", vector={vector})"""


def code(source: str, *tags: str, **metadata):
    return new_code_cell(source, metadata={"tags": list(tags)} | metadata)


def write(root: Path, name: str, *sources: str, parameters: str | None = PARAMETERS) -> Path:
    """A notebook with a title, parameters and a cell for each source."""
    cells = [new_markdown_cell(f"# About {name}")]
    cells += [code(parameters, "parameters")] if parameters is not None else []
    path = root / "notebooks" / f"{name}.ipynb"
    for folder in (path.parent, root / "data"):  # as a project has them
        folder.mkdir(exist_ok=True)
    path.write_text(nb.dump(new_notebook(cells=[*cells, *map(code, sources)])))
    return path


def light_package(folder: Path) -> str:
    """A PYTHONPATH on which `dbb` is this package without its imports: a tiny notebook need not wait for torch."""
    (folder / "dbb").mkdir(parents=True)
    (folder / "dbb/__init__.py").write_text(f"__path__ = {list(dbb.__path__)!r}\nmarker = 'light'\n")
    return str(folder)
