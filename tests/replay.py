"""nbval over a notebook that was executed already: its own collector and its own comparison, on a kernel that replays.

Papermill has run every notebook by the time that nbval compares; running each a second time would tell nothing more.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import deque
from contextlib import redirect_stdout
from pathlib import Path
from queue import Empty
from unittest import mock
from xml.etree import ElementTree

import pytest

from dbb import notebook as nb
from tests.conftest import ROOT


class Replay:
    """Stands for nbval's `RunningKernel`: runs nothing, and answers each cell with what its execution has left."""

    def __init__(self, executed: Path):
        self.cells = iter(nb.code_cells(nb.read(executed)))
        self.messages: deque[dict] = deque()

    def execute_cell_input(self, source: str, allow_stdin: bool | None = None) -> str:
        cell = next(self.cells, None)
        if cell is None or cell.source != source:
            raise ValueError(f"another notebook was executed: it has no such cell here\n{source}")
        if cell.execution_count is None:
            raise ValueError(f"this cell did not run\n{source}")
        sent = [(output.output_type, output) for output in cell.outputs]
        sent.append(("status", {"execution_state": "idle"}))
        self.messages.extend(
            {"parent_header": {"msg_id": cell.id}, "msg_type": kind, "content": content} for kind, content in sent
        )
        return cell.id

    def get_message(self, stream: str, timeout: float | None = None) -> dict:
        if not self.messages:
            raise Empty
        return self.messages.popleft()

    def await_reply(self, msg_id: str, timeout: float | None = None) -> None:
        """The reply has come: the cell ran long ago."""

    def await_idle(self, parent_id: str, timeout: float) -> None:
        self.messages.clear()

    def is_alive(self) -> bool:
        return True

    def stop(self) -> None:
        """There is no process to end."""


def replay(options: list[str], executed: Path) -> tuple[int, str]:
    """Exit status and words of pytest with `options`, where nbval's kernel repeats the outputs of `executed`."""
    kernel = mock.patch("nbval.plugin.RunningKernel", lambda *_, **__: Replay(executed))
    with kernel, redirect_stdout(io.StringIO()) as said:
        status = pytest.main(options)
    return int(status), said.getvalue()


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
