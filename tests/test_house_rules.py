"""The rules of the house, for every notebook, and what is committed of it: nothing runs here."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path

from dbb import figures
from dbb import notebook as nb
from tests.books import CHECKED, FIGURES, PATHS, each_notebook, read, tagged
from tests.conftest import ROOT

CARD = ("question", "afterwards", "builds on", "time", "hardware")
MOST_CODE_CELLS = 30
MOST_CODE_LINES = 6  # the median of a notebook
SIZE_LIMIT = 4_000_000  # bytes of a committed notebook, outputs included
ABSOLUTE = re.compile(r"(?<![\w./~:-])/(home|root|Users|tmp|var|opt|usr|mnt|private)/\w|[A-Z]:\\Users")


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def code_lines(cell) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in cell.source.split("\n"))


def shown_text(path: Path) -> str:
    """All text that the outputs of the notebook hold."""
    outputs = [output for cell in nb.code_cells(read(path)) for output in cell.outputs]
    texts = [output.get("text", "") for output in outputs]
    data = [(kind, value) for output in outputs for kind, value in output.get("data", {}).items()]
    return "\n".join(texts + [str(value) for kind, value in data if not kind.startswith("image/png")])


# How it is written.


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


def test_the_manifest_lists_the_figures_and_nothing_else():
    entries = json.loads((FIGURES / figures.MANIFEST).read_text(encoding="utf-8"))["figures"]
    files = sorted(path.name for path in FIGURES.iterdir() if path.name != figures.MANIFEST)
    assert [entry["file"] for entry in entries] == files != []
    for entry in entries:
        content = (FIGURES / entry["file"]).read_bytes()
        assert (len(content), figures.sha256(content)) == (entry["bytes"], entry["sha256"])
        assert entry["alt"].strip() and (ROOT / "notebooks" / f"{entry['notebook']}.ipynb").exists()


@each_notebook
def test_nothing_passes_nbval_unseen(path):
    marked = tagged(path, CHECKED)
    assert marked, f"no cell is tagged {CHECKED}"
    assert [cell.source for cell in marked if cell.execution_count is None or not comparable(cell)] == []


def comparable(cell) -> bool:
    """nbval compares text, and leaves pictures and whatever has no count alone."""
    return any(out.get("text") or "text/plain" in out.get("data", {}) for out in cell.outputs)
