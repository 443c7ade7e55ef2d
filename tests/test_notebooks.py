"""The notebooks: each runs through papermill, draws the figures and gives the outputs that are committed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbb import figures, suite
from dbb import notebook as nb
from tests.books import FIGURES, PATHS, QUICKEST, code_cells, each_notebook, read
from tests.conftest import ROOT
from tests.replay import replayed

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


# Figures.


@each_notebook
def test_its_figures_are_those_committed(path, executed):
    drawn = executed.outcomes[path.stem].figures
    committed = [figure for figure in figures.read_manifest(FIGURES) if figure.notebook == path.stem]
    assert sorted(drawn) == sorted(committed), "make reproduce"
    for figure in drawn:
        assert_same_picture(executed.build / "figures" / figure.file, FIGURES / figure.file, figure.rounding)


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


@each_notebook
def test_its_marked_outputs_are_what_is_stored(path, executed, tmp_path, ledger):
    started = time.perf_counter()
    status, text, cells = replayed(path, executed.build / "notebooks" / path.name, tmp_path)
    ledger["nbval, on what papermill ran"][path.stem] = time.perf_counter() - started
    assert status == 0, text
    assert cells == len(code_cells(path))


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
