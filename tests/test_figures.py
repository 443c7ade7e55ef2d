"""The files of the figures: shown with an alt text, the same to the byte each time, listed in a manifest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbb import cli, figures
from dbb.figures import Figure
from tests.tiny import FIGURE, light_package, write

DRAW = """
from matplotlib import pyplot as plt
from dbb.figures import show
for name, vector in (("01-fold", False), ("01-folds", True)):
    fig, axes = plt.subplots(layout="constrained")
    axes.imshow([[1, 2], [3, 4]])
    axes.fill_between([0, 1], [0, 1], hatch="/", clip_on=True)
    show(fig, name, "two by two", vector=vector)
    assert not plt.get_fignums()
"""


@pytest.mark.slow
def test_two_processes_draw_the_same_bytes(tmp_path):
    light = {"PYTHONPATH": light_package(tmp_path / "light"), "MPLBACKEND": "agg"}
    for folder in ("one", "two"):
        env = os.environ | light | {"DBB_FIGURES": str(tmp_path / folder)}
        subprocess.run([sys.executable, "-c", DRAW], env=env, check=True)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
    assert one == two and sorted(one) == ["01-fold.png", "01-folds.svg"]
    assert all(b"Matplotlib" not in content and b"<dc:date>" not in content for content in one.values())


@pytest.mark.parametrize("name", ["fold", "1-fold", "01_fold", "01-Fold", "01-", "01-a b", "../01-fold", "01-fold.png"])
def test_a_name_is_a_number_and_a_slug(name):
    with pytest.raises(ValueError, match="must be NN-slug"):
        figures.show(None, name, "something")


@pytest.mark.parametrize("alt", ["", "  "])
def test_an_alt_text_is_needed(alt):
    with pytest.raises(ValueError, match="needs an alt text"):
        figures.show(None, "01-fold", alt)


def test_a_figure_has_the_number_of_its_notebook(monkeypatch):
    monkeypatch.setenv("DBB_NOTEBOOK", "02_branch_addition")
    with pytest.raises(ValueError, match="must start with its notebook's number: 02-fold"):
        figures.show(None, "01-fold", "something")


def test_two_notebooks_may_not_draw_the_same_name(tmp_path):
    one, two = Figure("01-a.png", "01_one", "c", "alt"), Figure("01-a.png", "01_two", "c", "alt")
    with pytest.raises(ValueError, match=r"01-a\.png is drawn twice \(by 01_one and 01_two\)"):
        figures.write_manifest(tmp_path, [one, two])


def built(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def ran(*names: str) -> dict[str, list[Figure]]:
    return {name[:2]: [Figure(name, name[:2], "code", f"about {name}")] for name in names}


def test_publishing_twice_changes_nothing(tmp_path):
    source, target = built(tmp_path / "built", "01-a.png", "02-b.svg"), tmp_path / "figures"
    assert figures.publish(ran("02-b.svg", "01-a.png"), source, target) == ["01-a.png", "02-b.svg", "manifest.json"]
    assert figures.publish(ran("01-a.png", "02-b.svg"), source, target) == []
    (first, _) = json.loads((target / "manifest.json").read_text())["figures"]
    assert first == {
        "file": "01-a.png", "notebook": "01", "code": "code", "alt": "about 01-a.png", "rounding": False,
        "bytes": 8, "sha256": figures.sha256(b"01-a.png"),
    }  # fmt: skip


def test_publishing_some_keeps_the_others_and_drops_what_is_stale(tmp_path):
    source, target = built(tmp_path / "built", "01-a.png", "01-new.png", "02-b.png"), tmp_path / "figures"
    figures.publish(ran("01-a.png", "02-b.png"), source, target, everything=True)
    assert figures.publish(ran("01-new.png"), source, target) == ["01-a.png", "01-new.png", "manifest.json"]
    assert [figure.file for figure in figures.read_manifest(target)] == ["01-new.png", "02-b.png"]
    assert not (target / "01-a.png").exists()


def test_publishing_all_drops_what_no_notebook_draws(tmp_path):
    source, target = built(tmp_path / "built", "01-a.png"), built(tmp_path / "figures", "07-old.png")
    assert "07-old.png" in figures.publish(ran("01-a.png"), source, target, everything=True)
    assert sorted(path.name for path in target.iterdir()) == ["01-a.png", "manifest.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = built(tmp_path / "figures", "01-a.png") / "01-a.png"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        figures.write_atomically(path, b"new")
    assert path.read_bytes() == b"01-a.png" and len(list(path.parent.iterdir())) == 1


@pytest.mark.slow
def test_the_command_redraws_figures_and_twice_changes_no_byte(tmp_path, monkeypatch, capsys):
    write(tmp_path, "01_line", FIGURE.format(name="01-line", vector=False))
    write(tmp_path, "02_lines", FIGURE.format(name="02-lines", vector=True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", light_package(tmp_path / "light"))
    assert cli.main(["figures"]) == 0
    assert "figures changed: 01-line.png, 02-lines.svg, manifest.json" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert cli.main(["figures", "--jobs", "1", "--update"]) == 0
    shown = capsys.readouterr().out
    assert "figures changed: none" in shown and "outputs updated: 01_line, 02_lines" in shown
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == first


@pytest.mark.slow
def test_a_notebook_that_fails_publishes_nothing(tmp_path, monkeypatch, capsys):
    write(tmp_path, "01_line", FIGURE.format(name="01-line", vector=False), "assert False")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", light_package(tmp_path / "light"))
    assert cli.main(["figures"]) == 1
    assert not (tmp_path / "figures/01-line.png").exists()
