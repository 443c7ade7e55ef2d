"""nbval over a notebook that was executed already: its own collector and its own comparison, on a kernel that replays.

Papermill has run every notebook by the time that nbval compares; running each a second time would tell nothing more.
"""

from __future__ import annotations

import io
from collections import deque
from contextlib import redirect_stdout
from pathlib import Path
from queue import Empty
from unittest import mock

import pytest

from dbb import notebook as nb


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
