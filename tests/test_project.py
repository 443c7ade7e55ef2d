"""The project around the package: what is locked, what is declared twice, what may be imported, how it looks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", LOCK, re.MULTILINE))
DIRECT = [
    Requirement(text) for text in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
]
HEAVY = ["torchvision", "matplotlib", "IPython", "jupyter_client", "papermill", "nbformat", "sklearn", "PIL"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_the_lock_satisfies_the_project(requirement):
    assert requirement.specifier.contains(Version(LOCKED[normal(requirement.name)]))


def test_the_lock_has_a_version_and_hashes_for_everything():
    entries = re.split(r"^(?=[a-zA-Z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    assert [e for e in entries if not re.match(r"[a-z0-9._-]+==\S+ ", e) or "--hash=sha256:" not in e] == []


def test_the_lock_holds_no_addresses():
    assert re.search(r"://|@ |--(extra-)?index|--find-links", LOCK) is None


def test_conda_users_get_the_same():
    """Conda brings the Python that the project asks for; pip brings the rest, from the project's own list."""
    lines = [line.strip("- ") for line in (ROOT / "environment.yml").read_text().split("\n") if line.strip()]
    python = next(line for line in lines if line.startswith("python "))
    assert Requirement(python).specifier == Requirement(f"python {PROJECT['requires-python']}").specifier
    editable = next(line for line in lines if line.startswith("editable"))
    assert Requirement(editable.split()[-1].replace(".", PROJECT["name"])).extras == set(EXTRAS)


def test_every_place_names_the_same_pythons():
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    minors = [f"3.{minor}" for minor in range(int(low), int(high))]
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/test.yml").read_text())[1]
    assert re.findall(r"[\d.]+", matrix) == minors
    assert f"(3, {low}) <= sys.version_info[:2] <= (3, {int(high) - 1})" in (ROOT / "Makefile").read_text()


def test_the_top_level_is_as_promised():
    wanted = ["notebooks", "dbb", "data", "figures", "environment.yml", "README.md"]
    assert [name for name in wanted if not (ROOT / name).exists()] == []


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK) and "set -euo pipefail" in (text := script.read_text())
    assert text.strip().endswith("make test")
    assert "run: make test" in (ROOT / ".github/workflows/test.yml").read_text()


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_is_light():
    script = f"import sys, dbb; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_figures_and_the_runner_load_no_jupyter_before_they_need_it():
    script = f"import sys, dbb.figures, dbb.suite, dbb.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_points_at_the_machine_that_it_was_made_on():
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    kinds = (".py", ".md", ".toml", ".yml", ".lock", ".ipynb", ".json", ".svg", "Makefile")
    paths = [Path(ROOT, name) for name in files.stdout.split("\n") if name.endswith(kinds)]
    assert [path.name for path in paths if path.exists() and str(ROOT) in path.read_text(encoding="utf-8")] == []
    assert len(paths) > 20
