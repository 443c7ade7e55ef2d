"""Every notebook in JupyterLab, in a browser, as its reader has it: opened, restarted and run, looked at, saved.

A picture of each is kept in `build/jupyterlab/`. Without a browser these tests are skipped, in CI they fail (see
`tests/browser.py`).
"""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dbb import notebook as nb
from dbb import suite
from tests import lab as jupyter
from tests.books import CHECKED, PATHS, each_notebook
from tests.browser import browser, require_browser
from tests.conftest import ROOT
from tests.test_notebooks import assert_same_picture

pytestmark = pytest.mark.slow  # every notebook once more, in a browser

PROJECT = suite.Project(ROOT)


@pytest.fixture(scope="module")
def chromium():
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def lab(tmp_path_factory, offline):
    """A server on a copy of the notebooks, for a user who has another kernel by the name that the notebooks ask for."""
    require_browser()  # before anything is copied and started
    scratch = tmp_path_factory.mktemp("lab")
    folder = jupyter.copy_project(ROOT, scratch / "project")
    wrong = {"argv": ["false", "{connection_file}"], "display_name": "wrong", "language": "python"}
    (scratch / "data/kernels/python3").mkdir(parents=True)
    (scratch / "data/kernels/python3/kernel.json").write_text(json.dumps(wrong))
    env = offline | {"JUPYTER_PATH": str(Path(sys.prefix, "share/jupyter"))}  # as `make lab` has it
    with jupyter.jupyterlab(folder, scratch, env) as running:
        yield running


def test_there_are_notebooks():
    assert PATHS, "no notebooks: every test of this file would pass unseen"


@each_notebook
def test_restart_and_run_all(path, lab, chromium, ledger, tmp_path):
    with jupyter.open_notebook(chromium, lab, path.name) as notebook:
        assert notebook.complaints(ran=False) == [], "as it opens, before anything runs"
        ledger["JupyterLab"][path.stem] = notebook.restart_and_run_all()
        complaints = notebook.complaints(ran=True)
        notebook.picture(ROOT / "build/jupyterlab" / f"{path.stem}.png")
        assert complaints == []
        notebook.do("docmanager:save")
    saved = lab.folder / path.name
    assert saved.read_bytes() != path.read_bytes(), "nothing was saved: JupyterLab writes the version of the language"
    assert suite.clean(suite.Project(lab.folder.parent), [path.stem]) == ([path.stem], {})
    assert differences(nb.read(path), nb.read(saved), tmp_path) == []


# What a run in JupyterLab may change of what is committed: the pixels that other processors round otherwise, and the
# numbers in outputs that are not marked as reproducible, such as times.


def differences(stored, saved, scratch: Path) -> list[str]:
    """Where two clean notebooks differ by more than that; `scratch` is for the pictures that are compared."""
    if [cell.id for cell in stored.cells] != [cell.id for cell in saved.cells]:
        return ["there are other cells"]
    parts = [key for key in stored if key != "cells" and stored[key] != saved.get(key)]
    for old, new in zip(stored.cells, saved.cells):
        parts += [f"cell {old.id}: {part}" for part in _cell_differences(old, new, scratch)]
    return parts


def _cell_differences(old, new, scratch: Path) -> list[str]:
    parts = [key for key in old.keys() | new.keys() if key != "outputs" and old.get(key) != new.get(key)]
    before, after = ([_frame(output) for output in cell.get("outputs", ())] for cell in (old, new))
    if before != after:
        return [*parts, f"outputs {before} became {after}"]
    for was, now in zip(old.get("outputs", ()), new.get("outputs", ())):
        for kind, content in _contents(was).items():
            parts += _content_difference(kind, content, _contents(now)[kind], was, CHECKED in nb.tags(old), scratch)
    return parts


def _frame(output) -> dict:
    """All of an output but what it shows."""
    frame = {key: value for key, value in output.items() if key not in ("data", "text")}
    return frame | {"kinds": sorted(_contents(output))}


def _contents(output) -> dict:
    return output.get("data") or {"text": output.get("text", "")}


def _content_difference(kind: str, old: str, new: str, output, marked: bool, scratch: Path) -> list[str]:
    if kind == "image/png":
        for name, content in (("old.png", old), ("new.png", new)):
            (scratch / name).write_bytes(base64.b64decode(content))
        figure = output.metadata.get("dbb")
        rounding = figure is None or figure.get("rounding", False)  # what is no figure of the suite shows live rounding
        try:
            assert_same_picture(scratch / "new.png", scratch / "old.png", rounding)
        except AssertionError as other:
            return [f"another picture: {other}"]
        return []
    same = old == new if marked else without_numbers(old) == without_numbers(new)
    return [] if same else [f"{kind} {old!r} became {new!r}"]


def without_numbers(text: str) -> str:
    """The words of a text, and where between them numbers stand."""
    return " ".join(re.sub(r"[-+−]?\d+(\.\d+)?([eE][-+]?\d+)?", "#", text).split())


@pytest.fixture
def stored():
    """A notebook with marked and free text and a picture, as it is committed."""
    marked = new_code_cell("print('2 ms')", id="marked", metadata={"tags": [CHECKED]}, execution_count=1)
    marked.outputs = [new_output("stream", name="stdout", text="2 ms\n")]
    free = new_code_cell("print('3 ms')", id="free", execution_count=2)
    free.outputs = [new_output("stream", name="stdout", text="took 3 ms\n")]
    figure = next(path for path in sorted((ROOT / "figures").glob("*.png")))
    data = {"image/png": base64.b64encode(figure.read_bytes()).decode(), "text/plain": "a figure"}
    drawn = new_code_cell("show(fig)", id="drawn", execution_count=3)
    drawn.outputs = [new_output("display_data", data, metadata={"dbb": {"figure": figure.name}})]
    return nb.normalise(new_notebook(cells=[new_markdown_cell("# A", id="card"), marked, free, drawn]))


def another_figure(book) -> None:
    figure = sorted((ROOT / "figures").glob("*.png"))[1]
    book.cells[3].outputs[0].data["image/png"] = base64.b64encode(figure.read_bytes()).decode()


ALTERED = {
    "other cells": lambda book: book.cells.pop(),
    "metadata": lambda book: book.metadata.kernelspec.update(name="another"),
    "cell card: source": lambda book: book.cells[0].update(source="# B"),
    "cell marked: metadata": lambda book: book.cells[1].metadata.update(tags=[]),
    "cell free: execution_count": lambda book: book.cells[2].update(execution_count=4),
    "cell marked: text '2 ms": lambda book: book.cells[1].outputs[0].update(text="3 ms\n"),
    "cell free: text 'took 3 ms": lambda book: book.cells[2].outputs[0].update(text="took 3 s\n"),
    "cell free: outputs": lambda book: book.cells[2].outputs.clear(),
    "cell drawn: outputs": lambda book: book.cells[3].outputs[0].metadata.dbb.update(figure="other.png"),
    "cell drawn: another picture": another_figure,
}


@pytest.mark.parametrize("what", ALTERED)
def test_differences_are_found(stored, what, tmp_path):
    saved = copy.deepcopy(stored)
    ALTERED[what](saved)
    (found,) = differences(stored, saved, tmp_path)
    assert what in found


@pytest.mark.parametrize("text", ["took 4 ms\n", "took 12.5  ms\n", "took 1e-3 ms\n"])
def test_other_numbers_are_no_difference_where_none_are_promised(stored, text, tmp_path):
    saved = copy.deepcopy(stored)
    saved.cells[2].outputs[0].text = text
    assert differences(stored, saved, tmp_path) == []


# The checks can fail: what is wrong with this notebook is found, and nothing else.

DISPLAY = "from IPython.display import *\ndisplay({{{!r}: {!r}, 'text/plain': 'a text'}}, raw=True)"
BROKEN = {
    "fine-prose": ("Prose with $x^2$, `$HOME` and\n\n$$\\frac{1}{2}$$\n", []),
    "fine-code": ("import os, sys\nprint([sys.executable, os.getcwd()])", []),
    "fine-formula": ("from IPython.display import *\nMarkdown('a $y$ in an output')", []),
    "stderr": ("import sys\nprint('careful', file=sys.stderr)", ["on stderr: careful"]),
    "picture": (DISPLAY.format("image/png", "AAAA"), ["a picture does not show: data:image/png;base64,AAAA"]),
    "missing": ("![a file](missing.png)", ["a picture does not show: a file"]),
    "far": ("![far](http://192.0.2.1/far.png)", ["a picture does not show: far"]),
    "widget": (DISPLAY.format(jupyter.WIDGET, {"model_id": "gone", "version_major": 2, "version_minor": 0}),
               ["1 widgets, 0 shown []"]),
    "unknown-kind": ("display({'application/x-unknown': 'a'}, raw=True)", ["1 outputs, 0 shown"]),
    "script": ("HTML('<script>console.error(\"a script complains\")</script>')", []),
    "half-formula": ("Half: $\\frac{1$", ["1 formulas, 0 drawn", "a formula is left as it is written: '"]),
    "open-formula": ("Open: $x", ["a formula is left as it is written: 'Open: $x"]),
    "wrong-formula": ("Wrong: $\\begin{matrix} 1 & 2$", ["a formula is wrong: \\begin{matrix} 1 & 2"]),
    "unknown-command": ("Unknown: $\\unknown x$", ["a formula is wrong: "]),
    "raises": ("1 / 0", ["raised ZeroDivisionError: division by zero"]),
    "behind": ("print('never')", ["did not run"]),
}  # fmt: skip
PROSE = ("fine-prose", "missing", "far", "half-formula", "open-formula", "wrong-formula", "unknown-command")


@pytest.fixture(scope="module")
def broken(lab, chromium):
    """What is said about the notebook of faults, and that notebook as it was saved."""
    cells = [
        (new_markdown_cell if name in PROSE else new_code_cell)(source, id=name) for name, (source, _) in BROKEN.items()
    ]
    path = lab.folder / "broken.ipynb"
    path.write_text(nb.dump(new_notebook(cells=cells, metadata={"kernelspec": nb.KERNEL})))
    with jupyter.open_notebook(chromium, lab, path.name) as notebook, pytest.MonkeyPatch.context() as patch:
        patch.setattr(jupyter, "SETTLE_SECONDS", 3)
        notebook.restart_and_run_all()
        said = notebook.complaints(ran=True)
        notebook.do("docmanager:save")
    yield SimpleNamespace(said=said, saved=nb.read(path), path=path)
    path.unlink()


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_of_a_cell_is_reported(broken, name):
    found = [text.removeprefix(f"cell {name}: ") for text in broken.said if text.startswith(f"cell {name}: ")]
    assert len(found) == len(BROKEN[name][1])
    assert all(text.startswith(wanted) for text, wanted in zip(found, BROKEN[name][1])), found


@pytest.mark.parametrize("what", [
    r"on the console: a script complains",
    r"a request left this machine: http://192\.0\.2\.1/far\.png",
    r"status 404: .*/missing\.png",
])  # fmt: skip
def test_a_fault_of_the_page_is_reported(broken, what):
    assert [text for text in broken.said if re.match(what, text)]


def test_a_notebook_that_raised_is_not_clean(broken, lab):
    changed, stale = suite.clean(suite.Project(lab.folder.parent), [str(broken.path)])
    assert (changed, stale) == ([], {"broken": "a cell failed"})


def test_the_kernel_is_of_this_environment_and_works_beside_the_notebook(broken, lab):
    """Although the user has another kernel of that name."""
    cell = next(cell for cell in broken.saved.cells if cell.id == "fine-code")
    assert cell.outputs[0].text.strip() == str([sys.executable, os.path.realpath(lab.folder)])


def test_no_kernel_is_left(broken, lab):
    assert lab.ask("kernels") == []
