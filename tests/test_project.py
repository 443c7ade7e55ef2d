"""The project around the package: what is locked, what is declared twice, what may be imported, how it looks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.browser import NAMES
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


def test_ci_runs_all_tests():
    assert os.access(ROOT / ".ci/run", os.X_OK) and "set -euo pipefail" in (ROOT / ".ci/run").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert {"make test", "make test-slow"} <= set(steps)


def test_what_make_test_leaves_out_make_test_slow_runs():
    command = ["make", "--dry-run", "--always-make", "--no-print-directory"]
    said = {
        target: subprocess.run([*command, target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("test", "test-slow")
    }
    chosen = {target: re.search(r"-m pytest .*-m (.*)", text)[1].strip('"') for target, text in said.items()}
    assert chosen == {"test": "not slow", "test-slow": "slow"}


def test_make_test_proves_the_algebra_and_runs_the_notebooks():
    """Nobody marks these as slow."""
    for name in ("affine", "fold", "golden", "blocks", "steps", "verify", "surgery", "claims", "notebooks"):
        assert "pytestmark" not in (ROOT / f"tests/test_{name}.py").read_text(), name


TESTS = "make --keep-going test test-slow CI=true"


def run_ci(folder: Path, *programs: str, **env: str) -> str:
    """What `.ci/run` does where only `programs` are installed (and root is who calls it): a line for each program."""
    for name in ("apt-get", "make", "id", *programs):
        answer = {"id": "echo 0", "apt-get": 'echo "apt-get $*" >> "$LOG"'}.get(
            name, f'echo "{name} $* CI=$CI" >> "$LOG"'
        )
        (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (folder / name).chmod(0o755)
    (folder / "dirname").symlink_to(shutil.which("dirname"))
    log = folder / "log"
    own = {"PATH": str(folder), "LOG": str(log)} | env
    subprocess.run([shutil.which("bash"), ROOT / ".ci/run"], env=own, check=True, capture_output=True)
    return log.read_text()


def test_ci_gets_a_browser_where_there_is_none(tmp_path):
    done = run_ci(tmp_path).splitlines()
    assert [line.split()[1] for line in done[:-1]] == ["update", "install"] and "chromium" in done[1]
    assert done[-1] == TESTS


@pytest.mark.parametrize("name", [*NAMES, "mine"])
def test_ci_takes_the_browser_that_is_there(tmp_path, name):
    env = {"DBB_CHROMIUM": str(tmp_path / "mine")} if name == "mine" else {}
    assert run_ci(tmp_path, name, **env).splitlines() == [TESTS]


def test_every_target_is_in_the_help():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(targets)


@pytest.mark.slow
def test_the_hooks_of_pre_commit_run(tmp_path):
    """Each on a clean notebook, as pre-commit would call it: from the root, with the file behind its words."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local" and len(repository["hooks"]) == 3
    (tmp_path / "02.ipynb").write_bytes((ROOT / "notebooks/02_branch_addition.ipynb").read_bytes())
    for hook in repository["hooks"]:
        program, *words = hook["entry"].split()
        assert program.startswith(".venv/bin/") and hook["language"] == "system"
        command = [str(Path(sys.executable).with_name(Path(program).name)), *words, str(tmp_path / "02.ipynb")]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0, hook["id"]
    assert (tmp_path / "02.ipynb").read_bytes() == (ROOT / "notebooks/02_branch_addition.ipynb").read_bytes()


def test_make_lab_offers_the_kernel_of_this_environment(tmp_path):
    """Also to who has another kernel of the same name, in the usual folder or in JUPYTER_PATH."""
    spec = {"argv": ["false"], "display_name": "wrong", "language": "python"}
    for folder in ("data/kernels/python3", "path/kernels/python3"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "kernel.json").write_text(json.dumps(spec))
    command = ["make", "--no-print-directory", "--dry-run", "lab", f"VENV={os.path.relpath(sys.prefix, ROOT)}"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    opens = r"jupyter lab( --allow-root| ) --LabApp.default_url=/lab/tree/(.*) notebooks$"
    (_, tour), *_ = re.findall(opens, recipe)
    assert (ROOT / "notebooks" / tour).exists()
    asked, found = re.subn(opens, "jupyter kernelspec list --json", recipe)
    assert found == 1 and ("--allow-root" in recipe) == (os.geteuid() == 0)
    env = {"JUPYTER_DATA_DIR": tmp_path / "data", "JUPYTER_PATH": tmp_path / "path", "JUPYTER_PREFER_ENV_PATH": "0"}
    env = os.environ | {name: str(value) for name, value in env.items()}
    done = subprocess.run(["sh", "-c", asked], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    kernel = json.loads(done.stdout)["kernelspecs"]["python3"]
    assert Path(kernel["resource_dir"]).resolve().is_relative_to(Path(sys.prefix).resolve())
    assert kernel["spec"]["argv"][0] in ("python", sys.executable)  # "python" stands for the Python of the server


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
