"""The notebooks: each runs through papermill, keeps the rules of the house, and shows what it stores."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dbb import figures, suite
from dbb import notebook as nb
from tests.conftest import ROOT
from tests.replay import replay

PATHS = sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
FIGURES = ROOT / "figures"
CARD = ("question", "afterwards", "builds on", "time", "hardware")
CHECKED = "nbval-check-output"
MOST_CODE_CELLS = 30
MOST_CODE_LINES = 6  # the median of a notebook
SIZE_LIMIT = 4_000_000  # bytes of a committed notebook, outputs included
ABSOLUTE = re.compile(r"(?<![\w./~:-])/(home|root|Users|tmp|var|opt|usr|mnt|private)/\w|[A-Z]:\\Users")
QUICKEST = ROOT / "notebooks/02_branch_addition.ipynb"
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path):
    return nb.read(path)


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def tagged(path: Path, tag: str) -> list:
    return [cell for cell in read(path).cells if tag in nb.tags(cell)]


def code_lines(cell) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in cell.source.split("\n"))


def shown_text(path: Path) -> str:
    """All text that the outputs of the notebook hold."""
    outputs = [output for cell in nb.code_cells(read(path)) for output in cell.outputs]
    texts = [output.get("text", "") for output in outputs]
    data = [(kind, value) for output in outputs for kind, value in output.get("data", {}).items()]
    return "\n".join(texts + [str(value) for kind, value in data if not kind.startswith("image/png")])


# All of them run.


def test_there_are_notebooks():
    assert PATHS, "no notebooks: every test of this file would pass unseen"


def test_every_notebook_runs(executed):
    assert sorted(executed.outcomes) == [path.stem for path in PATHS]


@each_notebook
def test_it_runs_through_papermill_offline(path, executed):
    outcome = executed.outcomes[path.stem]
    assert outcome.error is None, suite.complaint(outcome)


@each_notebook
def test_every_cell_ran_and_something_was_checked(path, executed):
    outcome = executed.outcomes[path.stem]
    assert outcome.cells == len(nb.code_cells(read(path))) > 0
    assert outcome.checks > 0, "a notebook asserts what it claims"


@each_notebook
def test_it_takes_about_a_minute_at_most(path, executed):
    assert executed.outcomes[path.stem].seconds < 150  # more than the minute, for machines that do other work, too


# The rules of the house.


@each_notebook
def test_its_name_is_a_number_and_words(path):
    assert path.parent == ROOT / "notebooks" and re.fullmatch(r"\d\d_[a-z0-9]+(_[a-z0-9]+)*", path.stem)
    assert sum(other.stem[:2] == path.stem[:2] for other in PATHS) == 1


@each_notebook
def test_it_opens_with_a_card(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {path.stem[:2]} ")
    assert [word for word in CARD if f"**{word}" not in first.source.lower()] == []


@each_notebook
def test_it_has_one_cell_of_literal_parameters(path):
    parameters = nb.parameters(read(path), path.stem)
    assert parameters["profile"] == "quick" and {"seed", "device"} <= set(parameters)
    assert "parameters" in nb.tags(nb.code_cells(read(path))[0]), "the parameters come first"


@each_notebook
def test_its_cells_are_short_and_few(path):
    cells = nb.code_cells(read(path))
    taught = [code_lines(cell) for cell in cells if "solution" not in nb.tags(cell)]
    assert len(taught) <= MOST_CODE_CELLS
    assert statistics.median(taught) <= MOST_CODE_LINES, taught


@each_notebook
def test_no_cell_is_empty_or_hides_its_output_with_a_semicolon(path):
    cells = read(path).cells
    assert [cell.source for cell in cells if not cell.source.strip()] == []
    assert [cell.source for cell in cells if cell.cell_type == "code" and cell.source.rstrip().endswith(";")] == []


@each_notebook
def test_nothing_is_allowed_to_fail_or_be_skipped(path):
    forbidden = {"raises-exception", "skip-execution", "nbval-skip", "nbval-ignore-output", "nbval-raises-exception"}
    assert [cell.source for cell in read(path).cells if nb.tags(cell) & forbidden] == []


@each_notebook
def test_every_exercise_has_a_folded_solution(path):
    cells = read(path).cells
    start = next(i for i, cell in enumerate(cells) if re.search(r"^## Exercises", cell.source, re.MULTILINE))
    asked = [i for i, c in enumerate(cells) if i >= start and re.search(r"^\*\*\d+\.", c.source, re.MULTILINE)]
    assert asked, "no exercise: each is a cell of prose that starts with **1.**"
    assert [i + 1 for i in asked] == [i for i, cell in enumerate(cells) if "solution" in nb.tags(cell)]
    assert all(cell.metadata.jupyter.source_hidden for cell in tagged(path, "solution"))


@each_notebook
def test_it_ends_with_a_summary_and_where_to_go_next(path):
    last = [line for line in prose(path).split("\n") if line.startswith("## ")][-2:]
    assert "Summary" in last[0] or "Summary" in last[-1]


@each_notebook
def test_its_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)", prose(path))
    assert [target for target in targets if not (path.parent / target).exists()] == []


# What is committed.


@each_notebook
def test_its_outputs_are_committed_in_order_and_without_errors(path):
    cells = nb.code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds and "error" not in kinds


@each_notebook
def test_it_is_committed_normalised(path):
    assert path.read_text(encoding="utf-8") == nb.dump(nb.normalise(read(path), ROOT)), "dbb run --update"
    assert path.stat().st_size < SIZE_LIMIT


@each_notebook
def test_its_outputs_say_nothing_about_this_machine(path):
    text = shown_text(path)
    assert ABSOLUTE.search(text) is None, ABSOLUTE.search(text)
    assert str(ROOT) not in path.read_text(encoding="utf-8")
    host = os.uname().nodename
    assert host not in text or len(host) < 6  # a short one stands in other words, too


# Figures.


@each_notebook
def test_its_figures_are_those_committed(path, executed):
    drawn = executed.outcomes[path.stem].figures
    committed = [figure for figure in figures.read_manifest(FIGURES) if figure.notebook == path.stem]
    assert sorted(drawn) == sorted(committed), "make reproduce"
    for figure in drawn:
        assert_same_picture(executed.build / "figures" / figure.file, FIGURES / figure.file, figure.rounding)


def test_the_manifest_lists_the_figures_and_nothing_else():
    entries = json.loads((FIGURES / figures.MANIFEST).read_text(encoding="utf-8"))["figures"]
    files = sorted(path.name for path in FIGURES.iterdir() if path.name != figures.MANIFEST)
    assert [entry["file"] for entry in entries] == files != []
    for entry in entries:
        content = (FIGURES / entry["file"]).read_bytes()
        assert (len(content), figures.sha256(content)) == (entry["bytes"], entry["sha256"])
        assert entry["alt"].strip() and (ROOT / "notebooks" / f"{entry['notebook']}.ipynb").exists()


def assert_same_picture(drawn: Path, committed: Path, rounding: bool = False) -> None:
    """Equal to the byte or, as other processors round differently, all but equal: every pixel, every coordinate.

    Of a picture of rounding errors only the greater part must be equal.
    """
    if drawn.read_bytes() == committed.read_bytes():
        return
    if drawn.suffix == ".svg":
        assert_same_drawing(drawn.read_text(encoding="utf-8"), committed.read_text(encoding="utf-8"))
        return
    new, old = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (drawn, committed))
    assert new.shape == old.shape
    off = np.abs(new - old).max(axis=-1)
    share, mean = (0.5, 50) if rounding else (0.002, 0.5)
    assert (off > 16).mean() < share and off.mean() < mean, f"{drawn.name}: {(off > 16).mean():.2%} of pixels differ"


def assert_same_drawing(drawn: str, committed: str) -> None:
    """The same elements and words in the same order, at coordinates that differ by less than an eye can see."""
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", drawn) == number.sub("#", committed), "the drawings have other elements"
    pairs = zip(number.findall(drawn), number.findall(committed))
    assert max((abs(float(new) - float(old)) for new, old in pairs), default=0) < 0.05, "the drawings have other places"


@pytest.mark.parametrize("other, message", [("M 1.51 2.0", None), ("M 1.7 2.0", "places"), ("L 1.5 2.0", "elements")])
def test_drawings_are_compared(other, message):
    if message is None:
        assert_same_drawing("<path d='M 1.5 2.0'/>", f"<path d='{other}'/>")
    else:
        with pytest.raises(AssertionError, match=f"other {message}"):
            assert_same_drawing("<path d='M 1.5 2.0'/>", f"<path d='{other}'/>")


@pytest.mark.parametrize("pixels, rounding, same", [(1, False, True), (400, False, False), (400, True, True)])
def test_pictures_are_compared(tmp_path, pixels, rounding, same):
    old = np.full((100, 100, 3), 200, dtype=np.uint8)
    new = old.copy()
    new.reshape(-1, 3)[:pixels] = 100
    for name, image in (("old", old), ("new", new)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    if same:
        assert_same_picture(tmp_path / "new.png", tmp_path / "old.png", rounding)
    else:
        with pytest.raises(AssertionError, match="pixels differ"):
            assert_same_picture(tmp_path / "new.png", tmp_path / "old.png", rounding)


# Stored outputs are compared with new ones, by nbval.


def options(path: Path, record: Path) -> list[str]:
    """What nbval is asked for, whichever kernel answers it."""
    asked = ["-c", os.devnull, "--rootdir", str(path.parent), "-p", "no:cacheprovider", "-q", "--tb=short"]
    asked += ["--nbval-lax", "--nbval-current-env", f"--nbval-sanitize-with={ROOT / 'tests/nbval.cfg'}"]
    return [*asked, f"--junitxml={record}", str(path)]


def nbval(path: Path, folder: Path, env: dict[str, str]) -> tuple[int, str, int]:
    """Run nbval over `path` in a process of its own; return its exit status, what it printed, how many cells it saw."""
    record = folder / f"{path.stem}.xml"
    command = [sys.executable, "-m", "pytest", *options(path, record)]
    own = {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_PLATFORM_DIRS": "1"}
    done = subprocess.run(command, env=os.environ | env | own, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, cells_seen(record)


def replayed(path: Path, executed: Path, folder: Path) -> tuple[int, str, int]:
    """The same of nbval over `path` as stored, with the outputs of `executed` for the new ones."""
    record = folder / f"{path.stem}.xml"
    return *replay(options(path, record), executed), cells_seen(record)


def cells_seen(record: Path) -> int:
    return len(ElementTree.parse(record).findall(".//testcase"))


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


@each_notebook
def test_its_marked_outputs_are_what_is_stored(path, executed, tmp_path, ledger):
    started = time.perf_counter()
    status, text, cells = replayed(path, executed.build / "notebooks" / path.name, tmp_path)
    ledger["nbval, on what papermill ran"][path.stem] = time.perf_counter() - started
    assert status == 0, text
    assert cells == len(code_cells(path))


def test_nbval_runs_a_notebook_itself(tmp_path, ledger, offline):
    """As `pytest --nbval-lax notebooks/` does, with a kernel."""
    started = time.perf_counter()
    status, text, cells = nbval(QUICKEST, tmp_path, offline)
    ledger["nbval, with a kernel"][QUICKEST.stem] = time.perf_counter() - started
    assert status == 0, text
    assert cells == len(code_cells(QUICKEST))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the root", "elsewhere"])
def test_it_runs_from_another_folder(place, tmp_path, offline):
    """As `papermill notebooks/NN_name.ipynb OUT` does, whose working directory is the caller's."""
    folder = ROOT if place == "the root" else tmp_path
    command = [sys.executable, "-m", "papermill", str(QUICKEST), str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    own = {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_PLATFORM_DIRS": "1"}
    done = subprocess.run(command, cwd=folder, env=os.environ | offline | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert nb.staleness(read(tmp_path / "out.ipynb")) == ""


@each_notebook
def test_nothing_passes_nbval_unseen(path):
    marked = tagged(path, CHECKED)
    assert marked, f"no cell is tagged {CHECKED}"
    assert [cell.source for cell in marked if cell.execution_count is None or not comparable(cell)] == []


def comparable(cell) -> bool:
    """nbval compares text, and leaves pictures and whatever has no count alone."""
    return any(out.get("text") or "text/plain" in out.get("data", {}) for out in cell.outputs)


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
