"""What all tests share: the project, the one run of every notebook, and the ledger of where the time went."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)  # small tensors: a second thread costs more than it does, and much more on a busy machine

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = Path(__file__).parent / "offline"
SECONDS: dict[str, float] = defaultdict(float)  # of each test file
NOTEBOOKS: dict[str, dict[str, float]] = defaultdict(dict)  # of each notebook, under papermill and nbval


def pytest_configure(config):
    """Where Python is told to keep no bytecode, the processes of this session share some, which is gone afterwards.

    Else each of them, more than a hundred, would compile torch and its like for itself: eight seconds of computing.
    """
    if sys.dont_write_bytecode:
        folder = tempfile.TemporaryDirectory(prefix="dbb-bytecode-")
        config.add_cleanup(folder.cleanup)
        os.environ["PYTHONPYCACHEPREFIX"] = folder.name
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session")
def ledger():
    """Where tests write down how long a notebook took: `ledger["papermill"]["01_conv_bn"] = 3.2`."""
    return NOTEBOOKS


@pytest.fixture(scope="session")
def offline() -> dict[str, str]:
    """The environment in which a process reaches nothing but this machine."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="session")
def executed(tmp_path_factory, ledger, offline) -> SimpleNamespace:
    """Every notebook, run once through papermill in the quick profile, two at once, offline and far from its files."""
    from dbb import suite

    build = tmp_path_factory.mktemp("suite")
    env = offline | {"DBB_FIGURES": str(build / "figures")}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    outcomes = suite.run(suite.Project(ROOT), jobs=2, env=env, build=build, cwd=elsewhere, say=lambda line: None)
    ledger["papermill"].update({outcome.notebook: outcome.seconds for outcome in outcomes})
    return SimpleNamespace(build=build, outcomes={outcome.notebook: outcome for outcome in outcomes})


def pytest_runtest_logreport(report):
    SECONDS[report.nodeid.partition("::")[0]] += report.duration


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes: it hands its times to the first
        session.config.workeroutput["notebooks"] = {tool: dict(times) for tool, times in NOTEBOOKS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for tool, times in getattr(node, "workeroutput", {}).get("notebooks", {}).items():
        NOTEBOOKS[tool].update(times)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("where the time went")
    for file, seconds in sorted(SECONDS.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{seconds:8.1f} s  {file}")
    for tool, times in sorted(NOTEBOOKS.items()):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in sorted(times.items()))
        terminalreporter.write_line(f"{sum(times.values()):8.1f} s  of notebooks under {tool}: {parts}")


def pytest_collection_modifyitems(items):
    """The notebooks first: nothing takes longer, and everything else fits beside them."""
    items.sort(key=lambda item: "executed" not in item.fixturenames)
