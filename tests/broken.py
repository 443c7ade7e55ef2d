"""Run tests and notebooks against a broken copy of the package, in children of a process that has imported torch.

`python -m tests.broken` reads a list of jobs as JSON from its standard input, [folder, tests] or [notebook, folders,
folder of the sound package], and answers each: with the name of pytest's exit status or, for every folder, with the
error that ended the notebook and the cell where it did; "OK" where nothing is wrong. A fresh process does the forking:
one that has computed with torch holds threads that a fork would lose.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # for one child, on a busy machine
AT_ONCE = 2  # jobs


def copy_package(folder: Path) -> Path:
    """The package and its tests, to be broken."""
    for name in ("dbb", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def import_for_all() -> None:
    """Import once what every child needs; none of it computes anything."""
    import einops  # noqa: F401
    import hypothesis  # noqa: F401
    import IPython.core.interactiveshell  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    import torch._dynamo
    import torch.utils.flop_counter  # noqa: F401
    import torchvision  # noqa: F401

    gc.freeze()  # none of this is ever garbage: no child need look through it


def verdict(folder: Path | str, what: list[str] | str, cells: int | None = None) -> str:
    """What comes of the tests, or of the notebook, with the package in `folder`; "OK" where nothing is wrong.

    Of the notebook only the first `cells` run, where that is given.
    """
    if isinstance(what, str):
        return _in_child(lambda: _run_notebook(str(folder), what, cells))
    return _in_child(lambda: _run_tests(str(folder), what))


def verdicts_on_notebook(notebook: str, folders: list[str], sound: str) -> list[str]:
    """The verdicts with each broken package, then the one with the sound package.

    The sound one gets as far as the last cell that stopped a broken one: where it passes, it was the fault that stopped
    the others. What comes behind, the suite itself runs.
    """
    found = [verdict(folder, notebook) for folder in folders]
    stopped = [answer.rpartition(" in cell ")[2] for answer in found]
    furthest = max(map(int, stopped)) if all(cell.isdigit() for cell in stopped) else None
    return [*found, verdict(sound, notebook, furthest)]


def _in_child(work: Callable[[], str]) -> str:
    """The answer of `work`, done in a fork of this process; the name of the signal that ended it, if one did."""

    def quietly() -> str:
        signal.alarm(SECONDS)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return work()

    return _answer(*_fork(quietly))


def _fork(work: Callable[[], str]) -> tuple[int, int]:
    """Start `work` in a fork of this process; return its number and the pipe that its answer will come through."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, work().encode())
        os._exit(0)
    os.close(writing)
    return child, reading


def _answer(child: int, reading: int) -> str:
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return answer if status == 0 else signal.Signals(-status).name if status < 0 else f"exit {status}"


def _use_copy(folder: str) -> None:
    """Make `import dbb` and `import tests` mean the copy in `folder`."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    for name in [n for n in sys.modules if n.split(".")[0] in ("dbb", "tests")]:
        del sys.modules[name]


def _run_tests(folder: str, tests: list[str]) -> str:
    import pytest

    os.chdir(folder)
    _use_copy(folder)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:nbval", "--rootdir", folder, "-c", os.devnull]
    return pytest.ExitCode(pytest.main([*options, *tests])).name


def _run_notebook(folder: str, notebook: str, cells: int | None) -> str:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    os.chdir(Path(notebook).parent)
    os.environ |= {"DBB_FIGURES": f"{folder}/figures", "DBB_NOTEBOOK": Path(notebook).stem, "IPYTHONDIR": folder}
    _use_copy(folder)
    import dbb.figures

    dbb.figures._render = lambda *_: b""  # nobody looks at them, and drawing is a good part of the time
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    content = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in content if cell["cell_type"] == "code"]
    for number, source in enumerate(code[:cells], start=1):
        ran = shell.run_cell(source)
        if error := ran.error_before_exec or ran.error_in_exec:
            return f"{type(error).__name__} in cell {number}"
    return "OK"


def main() -> None:
    import_for_all()
    jobs = json.load(sys.stdin)
    numbers, feed = os.pipe()  # of the jobs that nobody has taken yet: one byte each, so that a read takes one job
    os.write(feed, bytes(range(len(jobs))))
    os.close(feed)

    def work() -> str:
        taken = iter(lambda: os.read(numbers, 1), b"")
        return json.dumps([(n, (verdict if len(jobs[n]) == 2 else verdicts_on_notebook)(*jobs[n])) for (n,) in taken])

    helpers = [_fork(work) for _ in range(AT_ONCE)]  # they share what is imported
    answers = dict(pair for helper in helpers for pair in json.loads(_answer(*helper)))
    json.dump([answers[n] for n in range(len(jobs))], sys.stdout)


if __name__ == "__main__":
    main()
