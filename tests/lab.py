"""JupyterLab as its user meets it: a server on a copy of the notebooks, a notebook opened in a browser, what it shows.

Only `open_notebook` and what it returns need a browser; the judgement of what a page shows, `complaints_about`, is a
function of plain values.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import ProxyHandler, Request, build_opener

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOST = "127.0.0.1"
NEEDED = ("notebooks", "data", "tests/golden")  # what notebooks read
WIDGET = "application/vnd.jupyter.widget-view+json"
START_SECONDS = 180
RUN_SECONDS = 900  # generous, for machines that do other work; how long a notebook may take is another test's concern
SETTLE_SECONDS = 20  # for pictures and formulas to appear
SEAM = 8  # pixels at the edges of the pieces of a picture, which have a line there
SETTINGS = {
    # Else a first visit asks, in a pop-up, whether to fetch news.
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # By default JupyterLab draws only the cells in view; a look at all of them needs all of them.
    "notebook-extension/tracker": {"windowingMode": "none"},
}
NOISE = {  # of JupyterLab itself, on the console of a page where all is well
    "Could not restore the debugger state: Canceled": "restarting the kernel cuts off the question for its breakpoints",
    "Canceled future for ": "the same, of whatever else JupyterLab was asking the kernel meanwhile",
}

LOOK = """() => {
  const texts = (node, what) => [...node.querySelectorAll(what)].map(found => found.textContent.slice(0, 200));
  const prose = node => {  // the words of rendered prose that are neither code nor formula
    const words = [], walk = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      if (!walk.currentNode.parentElement.closest('pre, code, mjx-container')) words.push(walk.currentNode.data);
    }
    return words.join('');
  };
  const facts = output => {
    const {name, ename, evalue, text} = output.toJSON();
    return {
      type: output.type, name: name ?? ename ?? '', kinds: Object.keys(output.data),
      text: (evalue ?? text ?? '').toString().slice(0, 200),
    };
  };
  const outputs = model => Array.from({length: model.outputs?.length ?? 0}, (_, n) => facts(model.outputs.get(n)));
  return jupyterapp.shell.currentWidget.content.widgets.map(({model, node}) => ({
    id: model.id, type: model.type, source: model.sharedModel.getSource(), count: model.executionCount ?? null,
    outputs: outputs(model),
    shown: [...node.querySelectorAll('.jp-OutputArea-output')].filter(output => output.offsetHeight > 0).length,
    images: [...node.querySelectorAll('img')].map(image => [image.naturalWidth, image.alt || image.src.slice(0, 80)]),
    formulas: node.querySelectorAll('.jp-MarkdownOutput mjx-container').length,
    wrong: texts(node, 'mjx-container:has(mjx-merror, [data-mjx-error], mjx-mtext[style*="color: red"])'),
    prose: [...node.querySelectorAll('.jp-RenderedMarkdown, .jp-RenderedLatex')].map(prose),
    widgets: node.querySelectorAll('.jupyter-widgets').length,
    lost: texts(node, '.jp-OutputArea-output').filter(text => /Error displaying widget|model not found/i.test(text)),
  }));
}"""


def copy_project(root: Path, target: Path) -> Path:
    """Copy what notebooks need from the project at `root`; return the folder of the copied notebooks."""
    for name in NEEDED:
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("cache", ".ipynb_checkpoints"))
    return target / "notebooks"


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it is, and the folder that it shows."""

    url: str
    token: str
    folder: Path

    def ask(self, path: str, method: str = "GET"):
        """What the server's API answers."""
        request = Request(f"{self.url}/api/{path}", method=method, headers={"Authorization": f"token {self.token}"})
        with build_opener(ProxyHandler({})).open(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def shut_down_kernels(self) -> None:
        """End every kernel, and with it its memory."""
        for kernel in self.ask("kernels"):
            self.ask(f"kernels/{kernel['id']}", "DELETE")


@contextmanager
def jupyterlab(folder: Path, scratch: Path, env: dict[str, str]) -> Iterator[Lab]:
    """Run JupyterLab of this Python on `folder`, on loopback, with `env` added to the environment, its kernels' too.

    What it keeps goes to `scratch`: the user's own settings play no part, and stay what they are.
    """
    lab = Lab(f"http://{HOST}:{_free_port()}", secrets.token_hex(16), folder)
    for name, content in SETTINGS.items():
        path = scratch / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    own = {"JUPYTER_TOKEN": lab.token, "OMP_NUM_THREADS": "1"} | _places(scratch) | env
    with (scratch / "server.log").open("w+") as log:
        server = subprocess.Popen(_command(lab), env=_clean_environment() | own, stdout=log, stderr=log)
        try:
            _wait_for(lab, server, log.name)
            yield lab
        finally:
            server.terminate()  # it takes its kernels with it
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _command(lab: Lab) -> list[str]:
    port = lab.url.rpartition(":")[2]
    options = [f"--ip={HOST}", f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={lab.folder}"]
    options += ["--no-browser", "--allow-root", "--LabApp.expose_app_in_browser=True"]  # window.jupyterapp
    return [sys.executable, "-m", "jupyterlab", *options]


def _places(scratch: Path) -> dict[str, str]:
    names = ("config", "data", "runtime")
    places = {f"JUPYTER_{name.upper()}_DIR": str(scratch / name) for name in names}
    places |= {f"JUPYTERLAB_{name.upper()}_DIR": str(scratch / name) for name in ("settings", "workspaces")}
    return places | {"IPYTHONDIR": str(scratch / "ipython"), "JUPYTER_PLATFORM_DIRS": "1"}


def _clean_environment() -> dict[str, str]:
    """The environment without what would write figures, or find another Jupyter."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DBB_", "JUPYTER"))}


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return free.getsockname()[1]


def _wait_for(lab: Lab, server: subprocess.Popen, log: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return lab.ask("status")
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"JupyterLab did not start:\n{Path(log).read_text()[-3000:]}") from None
            time.sleep(0.2)


@contextmanager
def open_notebook(browser: Browser, lab: Lab, name: str) -> Iterator[Notebook]:
    """Open the notebook `name` in a page of its own, with a kernel that is ready; both are gone on the way out."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    notebook = Notebook(page)
    try:
        page.goto(f"{lab.url}/lab/tree/{name}?reset&token={lab.token}", timeout=START_SECONDS * 1000)
        notebook.wait_for(
            "() => window.jupyterapp?.shell.currentWidget?.context?.isReady"
            " && jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
            " && !document.querySelector('#jupyterlab-splash')",
            START_SECONDS,
        )
        notebook.do("application:toggle-left-area")
        yield notebook
    finally:
        page.close()
        lab.shut_down_kernels()


class Notebook:
    """A notebook in a page: what its user does, and what goes wrong meanwhile."""

    def __init__(self, page: Page):
        self.page = page
        self.heard: dict[
            str, None
        ] = {}  # without repetition, from the page itself: errors on its console, requests that fail or go astray
        page.on("console", lambda message: message.type == "error" and self._hear("on the console", message.text))
        page.on("pageerror", lambda error: self._hear("in a script", str(error)))
        page.on("requestfailed", lambda request: self._hear("a request failed", request.url))
        page.on("response", lambda answer: answer.status >= 400 and self._hear(f"status {answer.status}", answer.url))
        for kind in ("request", "websocket"):
            page.on(kind, lambda asked: outside(asked.url) and self._hear("a request left this machine", asked.url))

    def do(self, command: str) -> None:
        """Carry out a command of JupyterLab, as its menus and keys do, and wait until it is done."""
        self.page.evaluate("command => jupyterapp.commands.execute(command)", command)

    def restart_and_run_all(self) -> float:
        """Kernel, *Restart Kernel and Run All Cells...*, *Restart*; wait for the end and return the seconds it took."""
        started = time.monotonic()
        self.page.evaluate(
            "() => { window.ran = null;"
            " jupyterapp.commands.execute('notebook:restart-run-all').then(passed => { window.ran = {passed} }) }"
        )
        self.page.locator(".jp-Dialog .jp-mod-accept", has_text="Restart").click()
        self.page.locator(".jp-Dialog").wait_for(state="detached")
        self.wait_for("() => window.ran || document.querySelector('.jp-Dialog')", RUN_SECONDS)
        return time.monotonic() - started

    def wait_for(self, condition: str, seconds: float) -> None:
        """Wait until the JavaScript function `condition` answers truth."""
        self.page.wait_for_function(condition, timeout=seconds * 1000, polling=100)

    def complaints(self, ran: bool) -> list[str]:
        """All that is wrong; what takes a moment to appear gets that moment."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (wrong := complaints_about(self.cells(), ran)) and time.monotonic() < deadline:
            self.page.wait_for_timeout(500)
        said = self.page.locator(".jp-Dialog, .Toastify__toast--error").all_inner_texts()
        return [*wrong, *self.heard, *(f"JupyterLab says {' '.join(text.split())!r}" for text in said)]

    def cells(self) -> list[dict]:
        """What each cell holds and shows."""
        return self.page.evaluate(LOOK)

    def picture(self, path: Path, piece: int = 4000) -> None:
        """Keep a picture of the whole notebook, which is higher than what a browser draws at once."""
        self.page.set_viewport_size({"width": 1000, "height": piece})
        scroller = self.page.locator(".jp-Notebook .jp-WindowedPanel-outer")
        box, seen = scroller.bounding_box(), scroller.evaluate("node => node.clientHeight")
        bottom = "node => node.scrollTop + [...node.querySelectorAll('.jp-Cell')].at(-1).getBoundingClientRect().bottom"
        whole = Image.new("RGB", (int(box["width"]), int(scroller.evaluate(bottom) - box["y"]) + 20), "white")
        path.parent.mkdir(parents=True, exist_ok=True)
        for top in range(0, whole.height, seen - 2 * SEAM):
            move = "(node, top) => { node.scrollTop = top; return node.scrollTop }"  # less far on the last page
            reached, cut = int(scroller.evaluate(move, top)), SEAM if top else 0
            self.page.screenshot(path=path, clip=box)
            with Image.open(path) as part:
                whole.paste(part.crop((0, cut, *part.size)), (0, reached + cut))
        whole.save(path)

    def _hear(self, what: str, text: str) -> None:
        if not any(known in text for known in NOISE):
            self.heard[f"{what}: {text[:300]}"] = None


def outside(url: str) -> bool:
    """Whether `url` is beyond this machine."""
    return re.match(rf"(data:|blob:|about:|(https?|wss?)://({re.escape(HOST)}|localhost)[:/])", url) is None


def formulas(markdown: str) -> int:
    """Count the formulas of a cell of prose, code left out."""
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return len(re.findall(r"\$\$.+?\$\$|(?<!\\)\$[^$]+\$", prose, flags=re.DOTALL))


def complaints_about(cells: list[dict], ran: bool) -> list[str]:
    """What is wrong with the cells of a page, as `LOOK` describes them, after all of them `ran` or before."""
    code = [cell for cell in cells if cell["type"] == "code" and cell["source"].strip()]
    counts = {cell["id"]: n for n, cell in enumerate(code, start=1)}
    found = []
    for cell in cells:
        wrong = [*_outputs(cell), *_pictures(cell), *_prose(cell)]
        if cell["id"] in counts and cell["count"] != counts[cell["id"]]:
            wrong.append(f"ran as {cell['count']}, not as {counts[cell['id']]}" if cell["count"] else "did not run")
        found += [f"cell {cell['id']}: {text}" for text in wrong]
    return found if code or not ran else [*found, "there is nothing to run"]


def _outputs(cell: dict) -> Iterator[str]:
    for output in cell["outputs"]:
        if output["type"] == "error":
            yield f"raised {output['name']}: {output['text']}"
        if output["name"] == "stderr":
            yield f"on stderr: {output['text'].strip()}"
    views = sum(WIDGET in output["kinds"] for output in cell["outputs"])
    if views > cell["widgets"] or cell["lost"]:
        yield f"{views} widgets, {cell['widgets']} shown {cell['lost']}"
    elif cell["shown"] < len(cell["outputs"]):
        yield f"{len(cell['outputs'])} outputs, {cell['shown']} shown"


def _pictures(cell: dict) -> Iterator[str]:
    drawn = sum(any(kind.startswith("image/") for kind in output["kinds"]) for output in cell["outputs"])
    if len(cell["images"]) < drawn:
        yield f"{drawn} pictures, {len(cell['images'])} shown"
    for width, name in cell["images"]:
        if not width:
            yield f"a picture does not show: {name}"


def _prose(cell: dict) -> Iterator[str]:
    wanted = formulas(cell["source"]) if cell["type"] == "markdown" else 0
    if cell["type"] == "markdown" and cell["formulas"] != wanted:
        yield f"{wanted} formulas, {cell['formulas']} drawn"
    yield from (f"a formula is wrong: {text or 'an unknown command'}" for text in cell["wrong"])
    for text in cell["prose"]:
        if raw := re.search(r"\$|\\[a-zA-Z(\[]", text):
            yield f"a formula is left as it is written: {text[max(0, raw.start() - 20) :][:60]!r}"
