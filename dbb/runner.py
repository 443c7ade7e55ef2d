"""One worker process of the suite: takes notebooks from its standard input, runs each through papermill.

Started by `dbb.suite` as a script (`python -P runner.py`), so that it imports neither torch nor the package: what is
under test is loaded by the kernels only. A job is one JSON line; the answer, one line, says how it ended. When its
input closes in the middle of a job - the suite was interrupted, or killed - the worker takes its kernel with it.
"""

import json
import os
import queue
import sys
import threading
import time
from contextlib import suppress


def main() -> None:
    """Run jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # kernels inherit the standard output: what they print must not get between the answers
    jobs: queue.Queue = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while (job := jobs.get()) is not None:
        print(json.dumps(_run(**json.loads(job))), file=answers)
        jobs.task_done()


def _listen(jobs: queue.Queue) -> None:
    for line in sys.stdin:
        jobs.put(line)
    if jobs.unfinished_tasks:
        _leave_nothing_behind()
    jobs.put(None)


def _leave_nothing_behind() -> None:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(130)


def _run(source: str, target: str, folder: str, parameters: dict, timeout: float | None, env: dict) -> dict:
    """Run the notebook `source` into `target`, in `folder`; say how long it took and what stopped it, if not a cell."""
    import papermill

    os.environ.update(env)
    literal = str.maketrans({"{": "{{", "}": "}}"})  # papermill takes braces in a path for format fields
    source, target = source.translate(literal), target.translate(literal)
    kernel = {"kernel_name": "python3", "language": "python", "execution_timeout": timeout, "start_timeout": 120}
    started, stopped = time.monotonic(), None
    try:
        papermill.execute_notebook(source, target, parameters, cwd=folder, progress_bar=False, **kernel)
    except papermill.PapermillExecutionError:
        stopped = None  # a cell failed, and its output tells how
    except Exception as error:  # a dead kernel or a timeout leaves no trace in the notebook
        stopped = [type(error).__name__, str(error).strip()]
    return {"seconds": time.monotonic() - started, "stopped": stopped}


if __name__ == "__main__":
    main()
