"""What compares stored outputs, nbval with a kernel or on what was executed, notices when they are others."""

from __future__ import annotations

import time

import pytest

from dbb import notebook as nb
from tests.books import CHECKED, PATHS, QUICKEST, code_cells, read
from tests.replay import nbval, replayed

pytestmark = pytest.mark.slow  # each runs nbval


def test_nbval_runs_a_notebook_itself(tmp_path, ledger, offline):
    """As `pytest --nbval-lax notebooks/` does, with a kernel."""
    started = time.perf_counter()
    status, text, cells = nbval(QUICKEST, tmp_path, offline)
    ledger["nbval, with a kernel"][QUICKEST.stem] = time.perf_counter() - started
    assert status == 0, text
    assert cells == len(code_cells(QUICKEST))


def printing(book, *texts: str):
    """`book` with one marked cell, which prints "two"; stored are `texts`."""
    outputs = [type(book)(output_type="stream", name="stdout", text=text) for text in texts]
    facts = {"execution_count": 1, "id": "a", "metadata": {"tags": [CHECKED]}, "cell_type": "code"}
    book.cells = [type(book)(facts | {"source": "print('two')", "outputs": outputs})]
    return book


def test_nbval_notices_another_output(tmp_path):
    (tmp_path / "01_other.ipynb").write_text(nb.dump(printing(read(PATHS[0]), "three\n")))
    status, text, _ = nbval(tmp_path / "01_other.ipynb", tmp_path, {})
    assert status == pytest.ExitCode.TESTS_FAILED and "three" in text


@pytest.mark.parametrize("stored", [("two\n",), ("t", "wo\n")], ids=["whole", "in pieces"])
def test_the_replay_accepts_the_same_output(stored, tmp_path):
    for name, texts in {"stored": stored, "executed": ("two\n",)}.items():
        (tmp_path / f"{name}.ipynb").write_text(nb.dump(printing(read(PATHS[0]), *texts)))
    assert replayed(tmp_path / "stored.ipynb", tmp_path / "executed.ipynb", tmp_path)[::2] == (0, 1)


def alter(cells: list, way: str) -> None:
    """Make what was executed, or stored, something else in its first marked cell."""
    cell = next(cell for cell in cells if CHECKED in nb.tags(cell))
    output = next(output for output in cell.outputs if output.get("text") or "text/plain" in output.get("data", {}))
    if way == "another":
        texts, key = (output, "text") if "text" in output else (output.data, "text/plain")
        texts[key] += "?"
    elif way == "missing":
        cell.outputs.remove(output)
    elif way == "not run":
        cell.execution_count, cell.outputs = None, []
    elif way == "failed":
        cell.outputs = [type(cell)(output_type="error", ename="ValueError", evalue="no", traceback=["ValueError: no"])]
    elif way == "gone":
        cells.remove(cell)


@pytest.mark.parametrize(
    "side, way, message",
    [
        ("stored", "another", "Cell outputs differ"),
        ("stored", "missing", "Cell outputs differ"),
        ("executed", "another", "Cell outputs differ"),
        ("executed", "missing", "Cell outputs differ"),
        ("executed", "not run", "this cell did not run"),
        ("executed", "failed", "Cell execution caused an exception"),
        ("executed", "gone", "another notebook was executed"),
    ],
)
def test_the_replay_notices(side, way, message, tmp_path):
    for name in ("stored", "executed"):
        book = read(QUICKEST)
        if name == side:
            alter(book.cells, way)
        (tmp_path / f"{name}.ipynb").write_text(nb.dump(book))
    status, text, cells = replayed(tmp_path / "stored.ipynb", tmp_path / "executed.ipynb", tmp_path)
    assert status == pytest.ExitCode.TESTS_FAILED and message in text
    assert cells == len(code_cells(QUICKEST))
