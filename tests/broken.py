"""Run tests and notebooks against a broken copy of the package, in children of a process that has imported torch.

`python -m tests.broken` reads a list of [folder, what] as JSON from its standard input, where `what` is a list of tests
or the path of a notebook, and answers for each the name of pytest's exit status or of the error that ended the
notebook, "OK" where nothing did. A fresh process does the forking: one that has computed with torch holds threads that
a fork would lose.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # for one child, on a busy machine


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
    import torch._dynamo
    import torch.utils.flop_counter  # noqa: F401
    import torchvision  # noqa: F401


def verdict(folder: Path | str, what: list[str] | str) -> str:
    """What comes of the tests, or of the notebook, with the package in `folder`; "OK" where nothing is wrong."""
    work = _run_notebook if isinstance(what, str) else _run_tests
    return _in_child(lambda: work(str(folder), what))


def _in_child(work: Callable[[], str]) -> str:
    """The answer of `work`, done in a fork of this process; the name of the signal that ended it, if one did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.write(writing, work().encode())
        os._exit(0)
    os.close(writing)
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


def _run_notebook(folder: str, notebook: str) -> str:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    os.chdir(Path(notebook).parent)
    os.environ |= {"DBB_FIGURES": f"{folder}/figures", "DBB_NOTEBOOK": Path(notebook).stem, "IPYTHONDIR": folder}
    _use_copy(folder)
    import dbb.figures

    dbb.figures._render = lambda *_: b""  # nobody looks at them, and drawing is a good part of the time
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    for cell in json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            ran = shell.run_cell("".join(cell["source"]))
            if error := ran.error_before_exec or ran.error_in_exec:
                return type(error).__name__
    return "OK"


def main() -> None:
    import_for_all()
    json.dump([verdict(folder, what) for folder, what in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
