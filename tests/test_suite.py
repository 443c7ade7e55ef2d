"""The runner of the notebooks: what passes, what fails and how, what an interruption leaves behind. With tiny ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from nbformat.v4 import new_notebook, new_output

from dbb import cli, pages, suite
from dbb import notebook as nb
from tests.tiny import FIGURE, code, light_package, write

pytestmark = pytest.mark.slow  # suites of small notebooks, through papermill

MEET = "import pathlib, time\npathlib.Path('{}').touch()\nwhile not pathlib.Path('{}').exists(): time.sleep(0.05)"
ENVIRONMENT = """import json, os, sys
names = ["OMP_NUM_THREADS", "DBB_NOTEBOOK", "HERE"]
print(json.dumps([os.getcwd(), sys.executable, *(os.environ.get(name) for name in names)]))"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> suite.Project:
    """One notebook for each way to end, in a folder whose name is hard on format strings."""
    root = tmp_path_factory.mktemp("a {project} of its own")
    write(
        root,
        "00_good",
        "assert seed == 0",
        "import math\nmath.isclose(1, 1)",
        "def assert_it(): return 7",
        "assert_it()",
    )
    write(root, "01_fails", "print('before')", "x = 1\nassert x == 2, 'x is one'", "print('never')")
    write(root, "02_dies", "import os\nos._exit(3)")
    write(root, "03_hangs", "import time\nif profile == 'quick': time.sleep(600)")
    write(root, "04_leaves", "import sys\nsys.exit(0)", "assert True")
    write(root, "09_skips", "assert True")
    skipped = nb.read(root / "notebooks/09_skips.ipynb")
    skipped.cells[2].metadata.tags = ["skip-execution"]
    (root / "notebooks/09_skips.ipynb").write_text(nb.dump(skipped))
    write(root, "05_nothing", parameters=None)
    write(root, "06_figure", FIGURE.format(name="06-line", vector=False), FIGURE.format(name="06-lines", vector=True))
    write(root, "07_where", ENVIRONMENT)
    write(root, "10_one", MEET.format("one", "two"))
    write(root, "11_two", MEET.format("two", "one"))
    write(root, "12_package", "import dbb\nassert dbb.marker == 'light'")
    write(root, "08_twice", *[FIGURE.format(name="08-line", vector=False)] * 2)
    return suite.Project(root)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the run prints."""
    return []


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> dict[str, str]:
    return {"PYTHONPATH": light_package(tmp_path_factory.mktemp("light"))}


@pytest.fixture(scope="module")
def outcomes(project, lines, light, tmp_path_factory) -> dict[str, suite.Outcome]:
    """One run of all that have parameters, two at once; where others look for kernels there is a wrong one."""
    names = [path.stem for path in suite.discover(project) if path.stem != "05_nothing"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", wrong_kernel(tmp_path_factory.mktemp("jupyter")))
        done = suite.run(project, names, jobs=2, timeout=20, env=light | {"HERE": "yes"}, say=lines.append)
    return {outcome.notebook: outcome for outcome in done}


def wrong_kernel(folder: Path) -> str:
    spec = {"argv": ["false", "{connection_file}"], "display_name": "wrong", "language": "python"}
    (folder / "kernels/python3").mkdir(parents=True)
    (folder / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    return str(folder)


def text_of(project: suite.Project, name: str) -> str:
    return "".join(out.text for c in nb.code_cells(executed(project, name)) for out in c.outputs if "text" in out)


def executed(project: suite.Project, name: str):
    return nb.read(project.build / "notebooks" / f"{name}.ipynb")


# Which one begins.


def test_the_first_half_runs_in_order_and_then_the_longest_first():
    paths = [Path(f"{n:02}_x.ipynb") for n in range(5)]
    assert [int(path.name[:2]) for path in suite._in_running_order(paths)] == [0, 1, 4, 3, 2]
    assert suite._in_running_order(paths[:1]) == paths[:1]


# How a notebook ends.


def test_a_good_one_passes(outcomes):
    good = outcomes["00_good"]
    assert (good.error, good.status, good.title, good.profile) == (None, "ok", "About 00_good", "quick")
    assert (good.cells, good.checks) == (5, 2)  # one assert, one call of assert_it; its definition checks nothing


def test_a_project_is_found_from_within_it_and_from_afar(outcomes, project, tmp_path, monkeypatch):
    for place in (project.root, project.notebooks, project.build, project.build / "notebooks"):
        monkeypatch.chdir(place)  # build/ has notebooks, too, those that ran, and is no project
        assert suite.find_project().root == project.root.resolve()
    assert suite.find_project(tmp_path).root == Path(suite.__file__).resolve().parents[1]


def test_kernels_work_where_they_are_told_to(project, light, tmp_path):
    (outcome,) = suite.run(project, ["07_where"], env=light, build=tmp_path / "build", cwd=tmp_path)
    assert outcome.error is None
    (cell,) = (c for c in nb.code_cells(nb.read(tmp_path / "build/notebooks/07_where.ipynb")) if "getcwd" in c.source)
    assert json.loads(cell.outputs[0].text)[0] == str(tmp_path.resolve())


def test_a_failing_cell_is_named_with_its_error(outcomes, project):
    error = outcomes["01_fails"].error
    assert (error.cell, error.name, error.message) == (3, "AssertionError", "x is one")
    assert any("assert x == 2" in line for line in error.traceback) and "\x1b" not in "".join(error.traceback)
    assert "01_fails failed in cell 3: AssertionError: x is one" in suite.complaint(outcomes["01_fails"])
    assert "before" in text_of(project, "01_fails") and "never" not in text_of(project, "01_fails")


@pytest.mark.parametrize("name, error", [("02_dies", "DeadKernelError"), ("03_hangs", "CellTimeoutError")])
def test_a_kernel_that_dies_or_hangs_is_named_and_the_notebook_shows_it(outcomes, project, name, error):
    failure = outcomes[name].error
    assert (failure.cell, failure.name) == (2, error)
    assert [out.ename for c in nb.code_cells(executed(project, name)) for out in c.outputs if "ename" in out] == [error]


def test_a_notebook_that_leaves_early_has_not_passed(outcomes):
    assert str(outcomes["04_leaves"].error) == "cell 2: SystemExit: 0"


def test_a_cell_that_did_not_run_fails(outcomes):
    assert str(outcomes["09_skips"].error) == "cell 2: NotExecuted: 1 of 2 code cells did not run"


def test_a_notebook_without_parameters_is_refused(project):
    with pytest.raises(ValueError, match=r"05_nothing has 0 cells tagged `parameters`, it needs exactly one"):
        suite.run(project, ["nothing"])


def test_a_run_that_does_nothing_fails(project):
    assert suite._failure([], None).name == "NothingToRun"
    with pytest.raises(ValueError, match=r"no notebooks in .*they are named NN_name"):
        suite.discover(suite.Project(project.root / "notebooks"))


def test_the_same_figure_twice_fails(outcomes):
    assert "08-line.png is drawn twice" in outcomes["08_twice"].error.message


def test_it_runs_in_its_folder_with_this_python_and_its_share_of_the_cores(outcomes, project):
    cwd, python, threads, name, here = json.loads(text_of(project, "07_where"))
    assert Path(cwd) == project.notebooks and Path(python) == Path(sys.executable)
    assert (name, here) == ("07_where", "yes")
    assert int(threads) == max(1, suite.cores() // 2)


def test_progress_is_told_as_each_ends(outcomes, lines):
    assert len(lines) == len(outcomes)
    assert [line.partition(" ")[0] for line in lines] == [f"[{n}/{len(lines)}]" for n in range(1, len(lines) + 1)]
    assert sum("ok" in line for line in lines) == sum(outcome.error is None for outcome in outcomes.values())


def test_the_table_has_a_line_for_each_and_a_sum(outcomes):
    rows = suite.table(list(outcomes.values())).split("\n")
    assert len(rows) == len(outcomes) + 2 and rows[-1].startswith(f"{len(outcomes)} run, 6 failed, ")


def test_what_was_run_is_remembered(outcomes, project):
    assert suite.last_outcome(project.build, "01_fails") == outcomes["01_fails"]
    assert suite.last_outcome(project.build, "06_figure") == outcomes["06_figure"]
    assert suite.last_outcome(project.build, "05_nothing") is None


def test_nothing_else_is_left_in_the_build_folder(outcomes, project):
    assert {path.name for path in project.build.iterdir()} <= {"notebooks", "figures", "report"}
    assert {path.suffix for path in (project.build / "notebooks").iterdir()} == {".ipynb", ".json"}


def test_two_run_at_once(outcomes):
    assert [outcomes[name].error for name in ("10_one", "11_two")] == [None, None]  # each waits for the other


def test_the_package_is_found_by_the_usual_rules(outcomes):
    """PYTHONPATH wins over what is installed: this is how a broken copy of the library is put to the test."""
    assert outcomes["12_package"].error is None


# What may be asked for.


@pytest.mark.parametrize(
    "name, found", [("1", "01_fails"), ("01", "01_fails"), ("fig", "06_figure"), ("00_good.ipynb", "00_good")]
)
def test_notebooks_are_named_by_number_or_part(project, name, found):
    assert [path.stem for path in suite.select(suite.discover(project), [name])] == [found]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"names": ["nope"]}, "no notebook 'nope'; there are 00_good, "),
        ({"names": ["77"]}, "no notebook '77'"),
        ({"names": ["good"], "profile": "huge"}, "no profile 'huge'; there are quick, gpu, paper"),
        ({"names": ["good"], "settings": {"sed": 1}}, "00_good has no parameter 'sed'; it has profile, seed"),
        ({"names": ["good"], "jobs": 0}, "jobs=0 must be 1 or more"),
    ],
)
def test_unknown_names_profiles_and_parameters_are_refused(project, arguments, message):
    with pytest.raises(ValueError, match=message):
        suite.run(project, **arguments)


def test_settings_are_literals_or_plain_strings():
    assert suite.parse_settings(["seed=3", "lr=1e-3", "device=cuda", "sizes=[1, 2]", "name='a=b'"]) == {
        "seed": 3, "lr": 1e-3, "device": "cuda", "sizes": [1, 2], "name": "a=b",
    }  # fmt: skip
    for wrong in ("seed", "=3", "a b=3"):
        with pytest.raises(ValueError, match="must be key=value"):
            suite.parse_settings([wrong])


def test_parameters_reach_the_notebook(tmp_path):
    write(tmp_path, "00_told", "print(profile, seed)\nassert (profile, seed) == ('gpu', 5)")
    (done,) = suite.run(suite.Project(tmp_path), [], "gpu", {"seed": 5}, say=str)
    assert (done.error, done.cells, done.profile) == (None, 2, "gpu")


@pytest.mark.parametrize(
    "source", ["seed = 1 + 1", "seed = f()", "import os", "a = b = 1", "seed: int", "(a, b) = 1, 2"]
)
def test_parameters_are_plain_literals(tmp_path, source):
    path = write(tmp_path, "00_odd", parameters=source)
    with pytest.raises(ValueError, match="must be lines `name = literal`"):
        nb.parameters(nb.read(path), path.stem)


def test_off_the_network(tmp_path, offline):
    """The guard under which the real notebooks run refuses what they must not do, and nothing else."""
    write(tmp_path, "00_address", "import socket\nsocket.socket().connect(('192.0.2.1', 80))")
    write(tmp_path, "01_name", "import urllib.request\nurllib.request.urlopen('http://example.org', timeout=5)")
    write(tmp_path, "02_self", "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
          "socket.create_connection(server.getsockname()).close()\nassert True")  # fmt: skip
    address, name, own = suite.run(suite.Project(tmp_path), env=offline, say=str)
    assert "offline: socket.connect to 192.0.2.1 is refused" in address.error.message
    assert "offline: socket.getaddrinfo to example.org is refused" in name.error.message
    assert own.error is None, suite.complaint(own)


# Interruption.


def interrupt(tmp_path: Path, env: dict[str, str], number: int) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Start `dbb run`, wait until a cell is at work, send `number`; return the process and all that it had started."""
    write(tmp_path, "00_slow", "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(600)")
    command = [sys.executable, "-m", "dbb.cli", "run", "--jobs", "1"]
    listening = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "notebooks/started").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("ipykernel_launcher" in child.cmdline() for child in children)
    process.send_signal(number)
    return process, children


def test_ctrl_c_leaves_no_kernel_and_no_half_written_notebook(tmp_path, light):
    process, children = interrupt(tmp_path, light, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().endswith("dbb: interrupted; notebooks that had not ended are as they were")
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert [path.name for path in (tmp_path / "build").rglob("*")] == []


def test_a_killed_run_leaves_no_kernel(tmp_path, light):
    process, children = interrupt(tmp_path, light, signal.SIGKILL)
    process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert not (tmp_path / "build/notebooks").exists()


# Normalised for committing.


def test_normalising_again_changes_nothing(outcomes, project):
    for name in ("00_good", "06_figure", "07_where"):
        once = nb.normalise(executed(project, name), project.root)
        assert nb.dump(nb.normalise(once, project.root)) == nb.dump(once)


def test_normalising_keeps_what_counts_and_drops_the_rest(project):
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": f"in {project.root}/data\n"},
        {"output_type": "stream", "name": "stderr", "text": "UserWarning: careful\n"},
        {"output_type": "stream", "name": "stdout", "text": " 10%\r100%\ndone <f at 0x7f12345678>\n"},
        {"output_type": "execute_result", "execution_count": 9, "metadata": {}, "data": {"text/plain": "7"}},
    ]
    cell = code("f()", "nbval-check-output", papermill={"duration": 1.0}, jupyter={"source_hidden": True})
    cell |= {"execution_count": 9, "outputs": [type(cell)(output) for output in outputs]}
    book = new_notebook(cells=[code("seed = 1", "injected-parameters"), cell], metadata={"papermill": {"x": 1}})
    book.metadata["language_info"] = {"name": "python", "version": "3.12.1"}
    (normal,) = nb.normalise(book, project.root).cells
    assert normal.metadata == {"tags": ["nbval-check-output"], "jupyter": {"source_hidden": True}}
    assert (normal.id, normal.source, normal.execution_count) == (cell.id, "f()", 1)
    assert [out.get("text") for out in normal.outputs] == ["in ./data\ndone <f at 0x...>\n", None]
    assert normal.outputs[1].execution_count == 1
    assert "papermill" not in (text := nb.dump(nb.normalise(book, project.root))) and "3.12.1" not in text


def test_update_writes_outputs_back_once(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, "00_kept", "print('hello')", "assert True")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--update"]) == 0
    assert "outputs updated: 00_kept" in capsys.readouterr().out
    first = path.read_bytes()
    assert b"hello" in first and [c.execution_count for c in nb.code_cells(nb.read(path))] == [1, 2, 3]
    assert cli.main(["run", "--update"]) == 0
    assert path.read_bytes() == first and "none changed" in capsys.readouterr().out


def test_update_does_not_overwrite_what_was_edited_meanwhile(tmp_path):
    path = write(tmp_path, "00_edited", "assert True")
    project = suite.Project(tmp_path)
    done = suite.run(project, say=str)
    write(tmp_path, "00_edited", "assert 1 == 1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="00_edited was edited while it ran"):
        suite.update(project, done)
    assert path.read_bytes() == before


def test_update_leaves_a_failed_notebook_alone(outcomes, project):
    before = (project.notebooks / "01_fails.ipynb").read_bytes()
    assert suite.update(project, [outcomes["01_fails"]]) == []
    assert (project.notebooks / "01_fails.ipynb").read_bytes() == before


# The report.


@pytest.fixture(scope="module")
def report(outcomes, project) -> Path:
    return pages.write(project)


def test_the_report_has_a_row_and_a_page_for_each(report, outcomes):
    index = report.read_text()
    for name, outcome in outcomes.items():
        assert f'href="{name}.html">About {name}<' in index
        assert f"About {name}" in (page := (report.parent / f"{name}.html").read_text())
        assert outcome.error is None or f"Failed in {outcome.error}"[:30] in page
    assert "05_nothing" in index and "not run yet" in index


def test_the_report_asks_nothing_of_the_network(report):
    for page in report.parent.glob("*.html"):
        text = page.read_text()
        assert "<script" not in text and "<link" not in text and 'src="http' not in text, page.name


@pytest.mark.parametrize(
    "formula", [r"W' = \frac{\gamma}{\sigma} W", r"\begin{aligned} a &= b \\ c &= d \end{aligned}", r"a < b"]
)
def test_formulas_are_drawn_by_the_browser(formula):
    drawn = pages.mathml(formula, block=True)
    assert drawn.startswith("<math") and 'display="block"' in drawn and "<mi>&</mi>" not in drawn


def test_a_formula_that_cannot_be_drawn_is_shown_as_written():
    assert pages.mathml(r"\left( a < b") == "<code>\\left( a &lt; b</code>"


# The command line.


def test_a_failed_notebook_fails_the_command(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    assert cli.main(["run", "good", "fails"]) == 1
    shown = capsys.readouterr()
    assert "01_fails failed in cell 3: AssertionError: x is one" in shown.err
    assert "2 run, 1 failed" in shown.out and "build/report/index.html" in shown.out


def test_a_wrong_call_is_answered_in_one_line(project, light):
    command = [sys.executable, "-m", "dbb.cli", "run", "nope"]
    done = subprocess.run(command, cwd=project.root, env=os.environ | light, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.split("\n") if line] == [
        f"dbb: no notebook 'nope'; there are {', '.join(path.stem for path in suite.discover(project))}"
    ]


@pytest.mark.parametrize("arguments", [["--update", "--profile", "gpu"], ["--update", "--set", "seed=1"]])
def test_only_the_quick_profile_as_it_is_gets_committed(project, monkeypatch, capsys, arguments):
    monkeypatch.chdir(project.root)
    assert cli.main(["run", *arguments]) == 2
    assert "--update keeps the outputs of the quick profile" in capsys.readouterr().err


def test_list_names_them_and_their_last_run(outcomes, project, monkeypatch, capsys):
    monkeypatch.chdir(project.notebooks)
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "00_good" in shown and "About 00_good" in shown and "FAILED" in shown and "never run here" in shown


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "--help"])
    assert "dbb run verify --set seed=3" in capsys.readouterr().out


# Brought to the committed form after JupyterLab has saved them.


def committed(root: Path, name: str = "00_saved"):
    """A notebook as it is committed, in a project of its own, and its path."""
    write(root, name, "print('one')\nprint('two')", "1 + 1", "# A solution.")
    path = root / "notebooks" / f"{name}.ipynb"
    book = nb.read(path)
    book.cells[-1].metadata.tags = ["solution"]
    for count, cell in enumerate(nb.code_cells(book), start=1):
        cell.execution_count = count
    result = new_output("execute_result", {"text/plain": "2"}, execution_count=3)
    book.cells[2].outputs, book.cells[3].outputs = [new_output("stream", name="stdout", text="one\ntwo\n")], [result]
    book = nb.normalise(book, root)
    path.write_text(nb.dump(book))
    return book, path


VIEW = {"application/vnd.jupyter.widget-view+json": {"model_id": "a", "version_major": 2, "version_minor": 0}}
BY_JUPYTERLAB = {  # what it, its extensions or a kernel write beside the source and the outputs
    "kernel": lambda book: book.metadata.kernelspec.update(display_name="Python 3 (ipykernel)", env={}),
    "language": lambda book: book.metadata.language_info.update(version="3.12.1", codemirror_mode={"name": "ipython"}),
    "contents": lambda book: book.metadata.update(toc={"base_numbering": 1}, **{"toc-autonumbering": True}),
    "widgets": lambda book: book.metadata.update(widgets={"application/vnd.jupyter.widget-state+json": {"state": {}}}),
    "debugger": lambda book: book.metadata.update(vscode={"interpreter": {"hash": "0"}}, orig_nbformat=4),
    "collapsed": lambda book: book.cells[2].metadata.update(collapsed=True, scrolled=True),
    "trusted": lambda book: book.cells[2].metadata.update(trusted=True, editable=True, deletable=False),
    "times": lambda book: book.cells[2].metadata.update(execution={"iopub.status.idle": "2030-01-01T00:00:00Z"}),
    "hidden output": lambda book: book.cells[2].metadata.update(jupyter={"outputs_hidden": True}),
    "opened solution": lambda book: book.cells[-1].metadata.update(jupyter={"source_hidden": False}),
    "slide": lambda book: book.cells[0].metadata.update(slideshow={"slide_type": "slide"}),
    "split stream": lambda book: book.cells[2].update(
        outputs=[new_output("stream", name="stdout", text=text) for text in ("one\n", "t", "wo\n")]
    ),
    "warning": lambda book: book.cells[2].outputs.append(new_output("stream", name="stderr", text="careful\n")),
    "bar": lambda book: book.cells[2].outputs.append(new_output("stream", name="stdout", text="\r 10%\r100%")),
    "widget": lambda book: book.cells[2].outputs.append(new_output("display_data", VIEW)),
}


@pytest.mark.parametrize("way", BY_JUPYTERLAB)
def test_clean_puts_right_what_jupyterlab_saves(tmp_path, way):
    book, path = committed(tmp_path)
    before = path.read_bytes()
    BY_JUPYTERLAB[way](book)
    path.write_text(json.dumps(book))  # laid out by another program, too
    assert path.read_bytes() != before and path.read_text() != before.decode()
    assert suite.clean(suite.Project(tmp_path)) == (["00_saved"], {})
    assert path.read_bytes() == before
    assert suite.clean(suite.Project(tmp_path)) == ([], {})


def test_clean_keeps_what_the_author_wrote(tmp_path):
    book, path = committed(tmp_path)
    book.cells[2].source += "\nprint('three')"
    book.cells[2].metadata.tags = ["nbval-check-output"]
    book.cells[3].outputs[0].data["text/plain"] = "3"
    path.write_text(nb.dump(book))
    assert suite.clean(suite.Project(tmp_path)) == ([], {})
    assert nb.read(path) == book


def test_check_changes_nothing(tmp_path, monkeypatch, capsys):
    book, path = committed(tmp_path)
    committed(tmp_path, "01_good")
    BY_JUPYTERLAB["kernel"](book)
    path.write_text(saved := nb.dump(book))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["clean", "--check"]) == 1
    assert capsys.readouterr().out == "not clean: 00_saved\n" and path.read_text() == saved
    assert cli.main(["clean"]) == 0 and capsys.readouterr().out == "cleaned: 00_saved\n"
    assert cli.main(["clean", "--check"]) == 0 and capsys.readouterr().out == "not clean: none\n"


def failed(book) -> None:
    book.cells[-1].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]


STALE = {
    "4 of 4 code cells did not run": lambda book: [cell.update(execution_count=None) for cell in nb.code_cells(book)],
    "1 of 4 code cells did not run": lambda book: book.cells[2].update(execution_count=None),
    "did not run once each": lambda book: [book.cells[n].update(execution_count=c) for n, c in ((2, 3), (3, 2))],
    "did not run once each, from top": lambda book: book.cells[-1].update(execution_count=7),
    "a cell failed": failed,
}


@pytest.mark.parametrize("reason", STALE)
@pytest.mark.parametrize("check", [False, True], ids=["clean", "check"])
def test_stale_outputs_are_reported_and_not_hidden(tmp_path, monkeypatch, capsys, reason, check):
    book, path = committed(tmp_path)
    STALE[reason](book)
    book.metadata.kernelspec.display_name = "another"
    path.write_text(saved := nb.dump(book))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time, too
        assert cli.main(["clean", *(["--check"] if check else [])]) == 1
        said = capsys.readouterr().err
        assert said.startswith("dbb: 00_saved has stale outputs: ") and said.endswith("; dbb run 00_saved --update\n")
        assert reason in said
    assert path.read_text() == saved


@pytest.mark.parametrize("text", ["# words", '{"cells": [', "[]", '{"a": 1}', '{"cells": [{}], "nbformat": 4}'])
def test_what_is_not_a_notebook_is_named_and_nothing_is_changed(tmp_path, monkeypatch, capsys, text):
    book, path = committed(tmp_path)
    BY_JUPYTERLAB["kernel"](book)
    path.write_text(saved := nb.dump(book))
    (tmp_path / "notebooks/01_half.ipynb").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["clean"]) == 2
    assert "01_half.ipynb is not a whole notebook (" in capsys.readouterr().err
    assert path.read_text() == saved


def test_clean_takes_names_and_files(tmp_path):
    """A file is itself, even where a notebook of the project has its name."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for root in (inside, outside):
        root.mkdir()
        for name in ("00_saved", "01_other"):
            book, path = committed(root, name)
            BY_JUPYTERLAB["kernel"](book)
            path.write_text(nb.dump(book))
    project = suite.Project(inside)
    assert suite.clean(project, [str(outside / "notebooks/00_saved.ipynb")]) == (["00_saved"], {})
    assert suite.clean(project, ["saved", "0"], check=True) == (["00_saved"], {})
    assert suite.clean(project) == (["00_saved", "01_other"], {})
    with pytest.raises(ValueError, match=r"no notebook 'nope'; there are 00_saved, 01_other"):
        suite.clean(project, ["nope"])
