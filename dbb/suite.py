"""Runs the notebooks through papermill, several at once, each in a kernel of its own.

`run` is the whole of it: select notebooks, check their parameters, hand them to worker processes (`dbb.runner`), and
return one `Outcome` for each. Executed notebooks lie under `build/notebooks/`, also those that failed; one that was
interrupted leaves nothing.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Queue

from dbb import notebook as nb
from dbb.figures import Figure, drawn, write_atomically
from dbb.notebook import normalise

__all__ = ["PROFILES", "Failure", "Outcome", "Project", "clean", "discover", "normalise", "run", "select", "update"]

PROFILES = {"quick": 600, "gpu": 6 * 3600, "paper": None}  # how many seconds one cell may take
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # the colours of a traceback
TRACEBACK_LINES = 12
STOP_SECONDS = 10


@dataclass(frozen=True)
class Project:
    """Where things are, from the folder that holds `notebooks/`."""

    root: Path

    @property
    def notebooks(self) -> Path:
        """The notebooks as they are committed."""
        return self.root / "notebooks"

    @property
    def figures(self) -> Path:
        """The figures as they are committed."""
        return self.root / "figures"

    @property
    def build(self) -> Path:
        """Everything that a run makes; git ignores it."""
        return self.root / "build"


@dataclass(frozen=True)
class Failure:
    """What stopped a notebook: the cell (by count, 1 is the first code cell), the error, the end of the traceback."""

    cell: int | None
    name: str
    message: str
    traceback: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line: the cell and the error."""
        place = f"cell {self.cell}: " if self.cell else ""
        message = self.message.strip().partition("\n")[0]
        return f"{place}{self.name}: {message}" if message else f"{place}{self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of one notebook: seconds, cells executed, checks in them, figures drawn, and what stopped it."""

    notebook: str
    title: str
    profile: str
    finished: str
    seconds: float
    cells: int
    checks: int
    figures: tuple[Figure, ...] = ()
    error: Failure | None = None

    @property
    def status(self) -> str:
        """`ok` or `FAILED`."""
        return "FAILED" if self.error else "ok"


def find_project(start: Path | None = None) -> Project:
    """Return the project around `start`, by default the working directory; outside of any, this package's own."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "data").is_dir() and any((folder / "notebooks").glob("[0-9][0-9]_*.ipynb")):  # build/ has no data/
            return Project(folder)
    raise ValueError(f"no notebooks/NN_name.ipynb and data/ in {here} or above it: go to the folder of the project")


def discover(project: Project) -> list[Path]:
    """Return the notebooks in their order; ValueError where there are none."""
    found = sorted(project.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ValueError(f"no notebooks in {project.notebooks}: they are named NN_name.ipynb")
    return found


def select(notebooks: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return the notebooks that `names` mean, by number (`1`, `01`) or part of the name; all where no name is given."""
    chosen = {path for name in names for path in _matches(notebooks, name)}
    return [path for path in notebooks if path in chosen or not names]


def parse_settings(settings: Sequence[str]) -> dict:
    """Turn `key=value` strings into parameters: Python literals where they are some, else plain strings."""
    return dict(_parse_setting(setting) for setting in settings)


def run(
    project: Project,
    names: Sequence[str] = (),
    profile: str = "quick",
    settings: dict | None = None,
    *,
    jobs: int = 2,
    timeout: float | None = None,
    env: dict[str, str] | None = None,
    build: Path | None = None,
    cwd: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run the notebooks that `names` mean, `jobs` at once, and return their outcomes in order.

    `timeout` is the seconds that a cell may take (by default the profile's), `env` adds to the kernels' environment,
    `build` is where results go (by default the project's `build/`), `cwd` is the kernels' working directory (by default
    the notebooks' own folder), `say` prints a line as each notebook ends.
    Raises ValueError before anything runs for an unknown notebook, profile or parameter.
    """
    chosen = select(discover(project), names)
    parameters = {path: _injected(path, profile, settings or {}) for path in chosen}
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be 1 or more")
    build = (build or project.build).resolve()
    build.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix=".run-", dir=build) as scratch:
        folder, longest = (cwd or project.notebooks).resolve(), timeout or PROFILES[profile]
        tasks = [_task(path, folder, parameters[path], longest, Path(scratch)) for path in _in_running_order(chosen)]
        kernels = _kernel_environment(Path(scratch), build, min(jobs, len(tasks))) | (env or {})
        for task, answer in _work(tasks, min(jobs, len(tasks)), kernels, Path(scratch)):
            outcomes.append(_settle(task, answer, profile, build))
            say(f"[{len(outcomes)}/{len(tasks)}] {_line(outcomes[-1])}")
    return sorted(outcomes, key=lambda outcome: outcome.notebook)


def last_outcome(build: Path, name: str) -> Outcome | None:
    """Return what came of the notebook `name` when it last ran to an end, or None where it never did."""
    path = build / "notebooks" / f"{name}.json"
    if not path.exists():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["figures"] = tuple(Figure(**figure) for figure in facts["figures"])
    facts["error"] = facts["error"] and Failure(**facts["error"] | {"traceback": tuple(facts["error"]["traceback"])})
    return Outcome(**facts)


def update(project: Project, outcomes: Sequence[Outcome]) -> list[str]:
    """Write the normalised outputs of the notebooks that passed back into `notebooks/`; return the names that changed.

    Raises ValueError for a notebook that was edited while it ran.
    """
    changed = []
    for name in (outcome.notebook for outcome in outcomes if not outcome.error):
        path = project.notebooks / f"{name}.ipynb"
        executed = normalise(nb.read(project.build / "notebooks" / path.name), project.root)
        if [cell.source for cell in executed.cells] != [cell.source for cell in nb.read(path).cells]:
            raise ValueError(f"notebook {name} was edited while it ran: run it again")
        if path.read_text(encoding="utf-8") != (text := nb.dump(executed)):
            write_atomically(path, text.encode())
            changed.append(name)
    return changed


def clean(project: Project, names: Sequence[str] = (), check: bool = False) -> tuple[list[str], dict[str, str]]:
    """Bring notebooks that were saved by JupyterLab, or another editor, to the form in which they are committed.

    `names` are numbers, parts of names, or paths of files; all of the project's where there are none. Returns the names
    of those that changed (with `check` nothing is written: that would change) and, for those whose outputs are stale,
    the reason. A stale one is left as it is, or its cell counts, put in order, would hide that. Raises ValueError, and
    changes nothing, if one of them is not a notebook.
    """
    paths = [path for name in names or [""] for path in _files(project, name)]
    books = {path: nb.read(path) for path in dict.fromkeys(paths)}
    stale = {path: reason for path, book in books.items() if (reason := nb.staleness(book))}
    texts = {path: nb.dump(normalise(book, project.root)) for path, book in books.items() if path not in stale}
    changed = {path: text for path, text in texts.items() if path.read_text(encoding="utf-8") != text}
    for path, text in changed.items():
        if not check:
            write_atomically(path, text.encode())
    return [path.stem for path in changed], {path.stem: reason for path, reason in stale.items()}


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table of the outcomes for the terminal, a line for each and one for all."""
    width = max(len(outcome.notebook) for outcome in outcomes)
    rows = [
        f"{o.notebook:<{width}}  {o.seconds:7.1f} s {o.cells:6} {o.checks:7} {len(o.figures):8}  {o.status}"
        for o in outcomes
    ]
    failed = sum(outcome.error is not None for outcome in outcomes)
    seconds, checked = sum(o.seconds for o in outcomes), sum(o.checks for o in outcomes)
    total = f"{len(outcomes)} run, {failed} failed, {checked} checks, {seconds:.1f} s of notebooks"
    return "\n".join([f"{'notebook':<{width}}      time   cells  checks  figures  status", *rows, total])


def complaint(outcome: Outcome) -> str:
    """Return what to tell about a failed notebook: the notebook, the cell, the error, the end of the traceback."""
    lines = "".join(f"\n    {line}" for line in outcome.error.traceback)
    return f"{outcome.notebook} failed in {outcome.error}{lines}"


def _matches(notebooks: Sequence[Path], name: str) -> list[Path]:
    stem = Path(name).name.removesuffix(".ipynb")
    if stem.isdigit():
        found = [path for path in notebooks if int(path.name[:2]) == int(stem)]
    else:
        found = [path for path in notebooks if stem in path.stem]
    if not found or not stem:
        raise ValueError(f"no notebook {name!r}; there are {', '.join(path.stem for path in notebooks)}")
    return found


def _files(project: Project, name: str) -> list[Path]:
    """Return the file that `name` is the path of, else the notebooks that it means; all for an empty one."""
    return [Path(name)] if Path(name).is_file() else select(discover(project), [name] if name else [])


def _parse_setting(setting: str) -> tuple[str, object]:
    key, equals, value = setting.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"the setting {setting!r} must be key=value: say --set seed=1")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value  # device=cuda, without quotes


def _injected(path: Path, profile: str, settings: dict) -> dict:
    """Return the parameters that differ from the notebook's own, after checking that it has them all."""
    if profile not in PROFILES:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(PROFILES)}")
    own = nb.parameters(nb.read(path), path.stem)
    wanted = {"profile": profile} | settings
    for name in wanted:
        if name not in own:
            raise ValueError(f"notebook {path.stem} has no parameter {name!r}; it has {', '.join(own)}")
    return {name: value for name, value in wanted.items() if repr(value) != repr(own[name])}


def _in_running_order(notebooks: list[Path]) -> list[Path]:
    """The first half in order, as what is broken shows there soonest; then from the last, which take longest, down.

    Were the longest the last to begin, one worker would run it while the others wait.
    """
    half = len(notebooks) // 2
    return notebooks[:half] + notebooks[half:][::-1]


def _task(path: Path, folder: Path, parameters: dict, timeout: float | None, scratch: Path) -> dict:
    """Return a job for a worker; the notebook is copied, so that editing it meanwhile does no harm."""
    source, target = scratch / "source" / path.name, scratch / "target" / path.name
    for place in (source.parent, target.parent):
        place.mkdir(exist_ok=True)
    source.write_bytes(path.read_bytes())
    paths = {"source": str(source), "target": str(target), "folder": str(folder)}
    return paths | {"parameters": parameters, "timeout": timeout, "env": {"DBB_NOTEBOOK": path.stem}}


def _kernel_environment(scratch: Path, build: Path, jobs: int) -> dict[str, str]:
    """Return the environment for the kernels: this Python, a share of the cores, none of the user's own settings.

    The kernel named `python3` is looked up in `JUPYTER_PATH` first, so a kernel spec written there always wins.
    """
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    write_atomically(scratch / "kernels/python3/kernel.json", json.dumps(spec).encode())
    style = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "matplotlibrc"
    return {
        "DBB_FIGURES": str(Path(os.environ.get("DBB_FIGURES") or build / "figures").resolve()),
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_CONFIG_DIR": str(scratch / "config"),
        "JUPYTER_PATH": str(scratch),
        "JUPYTER_PLATFORM_DIRS": "1",
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "MATPLOTLIBRC": str(style),
        "OMP_NUM_THREADS": str(max(1, cores() // jobs)),
        "OMP_WAIT_POLICY": "PASSIVE",  # kernels that wait must not take the cores from those that compute
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


class _Worker:
    """A process that runs one notebook after the other; started when first needed, and anew should it die."""

    def __init__(self, env: dict[str, str], log: Path):
        self.env, self.log, self.process = env, log, None

    def run(self, task: dict) -> dict:
        """Hand over one task, wait for the answer."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            answer = ""
        if answer:
            return json.loads(answer)
        tail = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
        return {"seconds": 0.0, "stopped": ["WorkerDied", f"the process that ran the notebook ended; {tail}"]}

    def close(self) -> None:
        """End the process; closing its input in the middle of a notebook makes it take its kernel with it."""
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _start(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("runner.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with self.log.open("a") as log:  # a session of its own: Ctrl-C reaches this process alone, which then cleans up
            self.process = subprocess.Popen(
                command, env=os.environ | self.env, stderr=log, start_new_session=True, text=True, **pipes
            )


def _work(tasks: list[dict], jobs: int, env: dict[str, str], scratch: Path) -> Iterator[tuple[dict, dict]]:
    """Run `tasks` on `jobs` workers; yield each with its answer as it ends."""
    workers = [_Worker(env, scratch / f"worker-{n}.log") for n in range(jobs)]
    free: Queue[_Worker] = Queue()
    for worker in workers:
        free.put(worker)
    with _pool(workers) as pool:
        futures = {pool.submit(_run_on_free, free, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _run_on_free(free: Queue, task: dict) -> dict:
    worker = free.get()
    try:
        return worker.run(task)
    finally:
        free.put(worker)


@contextmanager
def _pool(workers: list[_Worker]) -> Iterator[ThreadPoolExecutor]:
    """A thread for each worker; on the way out, interrupted or not, no task starts and no worker is left."""
    pool = ThreadPoolExecutor(len(workers))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
        pool.shutdown()


def _settle(task: dict, answer: dict, profile: str, build: Path) -> Outcome:
    """Move the executed notebook into place and write down what came of it."""
    target = Path(task["target"])
    executed = nb.read(target if target.exists() else Path(task["source"]))
    _record_stop(executed, answer["stopped"])
    write_atomically(build / "notebooks" / target.name, nb.dump(executed).encode())
    outcome = _outcome(target.stem, executed, answer, profile)
    record = json.dumps(asdict(outcome), indent=1, ensure_ascii=False) + "\n"
    write_atomically(build / "notebooks" / f"{target.stem}.json", record.encode())
    return outcome


def _record_stop(executed, stopped: list[str] | None) -> None:
    """Note in the notebook what ended it from outside (a dead kernel, a timeout), at the cell that was running."""
    started = [cell for cell in nb.code_cells(executed) if cell.metadata.get("papermill", {}).get("start_time")]
    if stopped and started:
        name, message = stopped
        error = {"output_type": "error", "ename": name, "evalue": message, "traceback": message.split("\n")}
        outputs = [output for output in started[-1].outputs if output.output_type != "error"]  # that of the interrupt
        started[-1].outputs = [*outputs, type(executed)(error)]


def _outcome(name: str, executed, answer: dict, profile: str) -> Outcome:
    cells = nb.code_cells(executed)
    error = _failure(cells, answer["stopped"])
    try:
        figures = tuple(drawn(name, cells))
    except ValueError as twice:
        figures, error = (), error or Failure(None, "ValueError", str(twice))
    count = sum(cell.execution_count is not None for cell in cells)
    finished, seconds = time.strftime("%Y-%m-%d %H:%M:%S"), round(answer["seconds"], 2)
    return Outcome(name, nb.title(executed), profile, finished, seconds, count, nb.checks(executed), figures, error)


def _failure(cells: list, stopped: list[str] | None) -> Failure | None:
    """Return what is wrong with an executed notebook: an error, a cell that never ran, or nothing that ran at all."""
    for number, cell in enumerate(cells, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                lines = ESCAPES.sub("", "\n".join(output.traceback)).split("\n")
                return Failure(number, output.ename, output.evalue, tuple(lines[-TRACEBACK_LINES:]))
    if stopped:
        return Failure(None, *stopped)
    skipped = [number for number, cell in enumerate(cells, start=1) if cell.execution_count is None]
    if skipped:
        return Failure(skipped[0], "NotExecuted", f"{len(skipped)} of {len(cells)} code cells did not run")
    return None if cells else Failure(None, "NothingToRun", "the notebook has no code")


def _line(outcome: Outcome) -> str:
    end = f"FAILED in {outcome.error}" if outcome.error else "ok"
    return f"{outcome.notebook:<28} {outcome.seconds:6.1f} s {outcome.checks:4} checks  {end}"
