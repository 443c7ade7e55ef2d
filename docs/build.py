"""Build the site: run the notebooks that changed since they last ran, lay out Sphinx's sources, call Sphinx.

    python docs/build.py              into build/site, ready to be opened from there or put on a server
    python docs/build.py --stored     show the outputs that are committed, run nothing

What the pages say is written once: the gallery comes from README.md, the groups from the map in notebook 00, alt texts
from the manifest of the figures, the tables from the ledger.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from dbb import claims, cli, matrix, suite
from dbb import notebook as nb
from dbb.figures import read_manifest
from dbb.results import read

DOCS = Path(__file__).resolve().parent
PREVIEW = re.compile(
    r"^\| \[!\[\]\(figures/(?P<figure>[^)]+)\)\].*?\| \[(?P<title>[^]]+)\]\(.*?\| (?P<question>.+) \|$", re.M
)
GROUP = re.compile(r"^\| \*\*(?P<name>[^*]+)\*\* \| \[?(?P<number>\d\d)", re.M)
REPOSITORY = re.compile(r"github\.com[/:](?P<name>[\w.-]+/[\w.-]+?)(\.git)?/?$")
UNKNOWN_REPOSITORY = "OWNER/NAME"
CARD = """\
:::{{grid-item-card}} {title}
:link: notebooks/{page}
:link-type: doc
:img-top: figures/{figure}
:img-alt: {alt}

{question}
:::
"""
RUN_IT = """\
:::{{dropdown}} Run it yourself
In a clone of the project:

```sh
make lab                            # JupyterLab: open {name} there
.venv/bin/dbb run {number}                # or run it through papermill, into build/notebooks/
.venv/bin/dbb run {number} --set seed=1   # with another parameter
```

While `make lab` runs, the notebook is at [localhost:8888/lab/tree/{name}](http://localhost:8888/lab/tree/{name}).

In Colab: {how}, and put these lines into a first cell.

```sh
!git clone --quiet https://github.com/{where}.git project
%cd project
!pip install --quiet --editable .[train,notebooks,downstream,export]
%cd notebooks
```

{{download}}`The notebook as a file <../download/{name}>`, with the outputs of its last committed run.
:::
"""
STATUS_BADGES = {
    claims.HOLDS: "success",
    claims.DIFFERS: "danger",
    claims.UNDECIDED: "warning",
    claims.PENDING: "info",
    claims.CANNOT: "secondary",
}


def main(arguments: list[str] | None = None) -> int:
    """Build the site; return the exit status, which is not 0 where a notebook failed or Sphinx had a warning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", action="store_true", help="show the committed outputs instead of running notebooks")
    parser.add_argument("--out", type=Path, help="where the site goes (default build/site)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many notebooks at once (default 2)")
    options = parser.parse_args(arguments)
    project = suite.Project(DOCS.parent)
    out = (options.out or project.build / "site").resolve()
    if not options.stored and not run_stale(project, options.jobs):
        return 1
    executed = project.notebooks if options.stored else project.build / "notebooks"
    status = build(lay_out(project, executed, out.with_name(f"{out.name}-source")), out)
    print(f"site: {out / 'index.html'}" if status == 0 else "the site was not built", flush=True)
    return status


def run_stale(project: suite.Project, jobs: int) -> bool:
    """Run the notebooks that are younger than their last run, or whose library or data are; tell whether all passed."""
    sources = [project.root / "dbb", project.root / "data"]
    newest = max(path.stat().st_mtime for folder in sources for path in files(folder))
    stale = [path.stem for path in suite.discover(project) if not fresh(project, path, newest)]
    outcomes = (
        suite.run(project, stale, jobs=jobs, env={"DBB_FIGURES": str(project.build / "figures")}) if stale else []
    )
    for outcome in (outcome for outcome in outcomes if outcome.error):
        print(suite.complaint(outcome), file=sys.stderr)
    return not any(outcome.error for outcome in outcomes)


def files(folder: Path) -> list[Path]:
    """The files in `folder` that a notebook may read; what was downloaded or compiled is none of them."""
    skipped = {"cache", "__pycache__"}
    return [path for path in folder.rglob("*") if path.is_file() and not skipped & set(path.relative_to(folder).parts)]


def fresh(project: suite.Project, path: Path, newest: float) -> bool:
    """Whether a notebook ran without an error in the quick profile, as it is now, after everything it rests on."""
    executed = project.build / "notebooks" / path.name
    last = suite.last_outcome(project.build, path.stem)
    if last is None or last.error or last.profile != "quick" or not executed.exists():
        return False
    return executed.stat().st_mtime > max(newest, path.stat().st_mtime)


def lay_out(project: suite.Project, executed: Path, source: Path) -> Path:
    """Write everything that Sphinx reads into `source`, anew; return it."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(DOCS / "pages", source)
    shutil.copytree(project.figures, source / "figures")
    shutil.copytree(project.root / "data/results", source / "extra/data/results")  # tables link to their records
    shutil.copytree(project.notebooks, source / "download", ignore=shutil.ignore_patterns(".*"))
    (source / "notebooks").mkdir()
    (source / "generated").mkdir()
    where = repository(project.root)
    for path in suite.discover(project):
        page = notebook_page(nb.read(executed / path.name), path.name, where)
        (source / "notebooks" / path.name).write_text(nb.dump(page), encoding="utf-8")
    for name, text in included(project).items():
        (source / "generated" / f"{name}.md").write_text(text, encoding="utf-8")
    return source


def build(source: Path, out: Path) -> int:
    """Let Sphinx make the pages; a warning is an error."""
    doctrees = out.with_name(f"{out.name}-doctrees")
    strict = ["--fail-on-warning", "--keep-going", "--quiet"]
    places = ["-c", str(DOCS), "-d", str(doctrees), "-D", f"html_extra_path={source / 'extra'}"]
    command = [sys.executable, "-m", "sphinx", "-b", "html", *places, *strict]
    shutil.rmtree(out, ignore_errors=True)
    return subprocess.run([*command, str(source), str(out)]).returncode


# Pages of notebooks


def notebook_page(notebook, name: str, where: str):
    """Return an executed notebook as a page: solutions folded, alt texts with the pictures, how to run it on top."""
    notebook = nb.normalise(notebook, DOCS.parent)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _fold_solution(cell)
            _describe_pictures(cell)
            cell.outputs = [_without_styles(output) for output in cell.outputs]
    cell = type(notebook.cells[0])(cell_type="markdown", id="run-it-yourself", metadata={}, source=run_it(name, where))
    notebook.cells.insert(1, cell)
    return notebook


def _fold_solution(cell) -> None:
    if "solution" in nb.tags(cell):
        cell.metadata.tags = [*cell.metadata.tags, "hide-cell"]
        cell.metadata["mystnb"] = {"code_prompt_show": "Show a solution", "code_prompt_hide": "Hide the solution"}


def _describe_pictures(cell) -> None:
    facts = [output.get("metadata", {}).get("image/png", {}) for output in cell.outputs]
    if alts := [fact["alt"] for fact in facts if "alt" in fact]:
        cell.metadata.setdefault("mystnb", {})["image"] = {"alt": " ".join(alts)}


def _without_styles(output):
    """A listing that brings colours of its own, for light pages only, becomes a listing of the page's."""
    data = output.get("data", {})
    if 'class="highlight"' in data.get("text/html", ""):
        output.data = {"text/markdown": f"```python\n{data['text/plain'].strip()}\n```"}
    return output


def run_it(name: str, where: str) -> str:
    """The box "Run it yourself" of the notebook `name`, with commands that can be copied as they are."""
    colab = "https://colab.research.google.com"
    opened = f"[open this notebook]({colab}/github/{where}/blob/main/notebooks/{name})"
    given = f"open [its start page]({colab}), upload the notebook"
    return RUN_IT.format(
        name=name,
        number=name[:2],
        where=where,
        how=opened if where != UNKNOWN_REPOSITORY else given,
    )


def repository(root: Path) -> str:
    """OWNER/NAME on GitHub: in a workflow there its environment says it, in a clone its origin."""
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return name
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    origin = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    found = REPOSITORY.search(origin)
    return found["name"] if found else UNKNOWN_REPOSITORY


# What pages include


def included(project: suite.Project) -> dict[str, str]:
    """The generated parts of pages, by name."""
    previews = PREVIEW.findall((project.root / "README.md").read_text(encoding="utf-8"))
    findings = claims.evaluate(project.root, claims.ledger(project.root))
    return {
        "gallery": gallery(project, previews),
        "contents": contents(project, {title[:2]: title for _, title, _ in previews}),
        "ledger": ledger(findings),
        "results": claims.markdown(findings),
        "matrix": runs(read(project.root / "data/results")),
        "others": others(project.root / "data/paper"),
        "examples": examples(),
    }


def examples() -> str:
    """The examples of the command line's help, as they stand there."""
    lines = cli.EXAMPLES.partition("Executed notebooks")[0].splitlines()[1:]
    return f"```text\n{textwrap.dedent(chr(10).join(lines)).strip()}\n```\n"


def gallery(project: suite.Project, previews: list[tuple[str, str, str]]) -> str:
    """A card for each notebook: a figure, its number and title, its question."""
    alts = {figure.file: figure.alt for figure in read_manifest(project.figures)}
    pages = {path.stem[:2]: path.stem for path in suite.discover(project)}
    cards = [
        CARD.format(title=title, page=pages[title[:2]], figure=figure, alt=alts[figure], question=question)
        for figure, title, question in previews
    ]
    return "::::{grid} 1 2 2 3\n:gutter: 3\n\n" + "\n".join(cards) + "::::\n"


def contents(project: suite.Project, titles: dict[str, str]) -> str:
    """The tables of contents, hidden, that make the sidebar: the notebooks in the groups of notebook 00's map."""
    tour = next(path for path in suite.discover(project) if path.stem.startswith("00"))
    prose = "\n".join(cell.source for cell in nb.read(tour).cells if cell.cell_type == "markdown")
    starts = {number: name for name, number in GROUP.findall(prose)}
    groups: dict[str, list[str]] = {}
    for path in suite.discover(project):
        name = starts.get(path.stem[:2]) or list(groups)[-1]
        groups.setdefault(name, []).append(f"{titles[path.stem[:2]]} <notebooks/{path.stem}>")
    return "\n".join(toctree(name, pages) for name, pages in groups.items())


def toctree(caption: str, pages: list[str]) -> str:
    """A hidden table of contents."""
    return "\n".join([f"```{{toctree}}\n:hidden:\n:caption: {caption}\n", *pages, "```\n"])


def ledger(findings: list[claims.Finding]) -> str:
    """Every claim with its status as a badge, what was published, and what it rests on."""
    lines = ["| Claim | Published | It rests on |", "|---|---|---|"]
    for finding in findings:
        claim = finding.claim
        badge = f"{{bdg-{STATUS_BADGES[finding.status]}}}`{finding.status}`"
        place = f", {claim.paper}" if claim.paper else ""
        lines.append(f"| {badge} {claim.says} (`{claim.id}`{place}) | {claim.published_words} | {finding.recorded} |")
    return "\n".join([*lines, ""])


def runs(records: list[dict]) -> str:
    """The experiments of the matrix: what each is to decide, how many of its runs are done, what they need."""
    lines = ["| Experiment | It asks | Runs done | Needs |", "|---|---|---|---|"]
    for name, experiment in matrix.EXPERIMENTS.items():
        done = sum(matrix.find_record(run, records) is not None for run in experiment.runs)
        needs = f"{'a GPU' if experiment.device == 'cuda' else 'a CPU'}, {experiment.recipe.data}"
        lines.append(f"| `{name}` | {experiment.question} | {done} of {len(experiment.runs)} | {needs} |")
    return "\n".join([*lines, ""])


def others(folder: Path) -> str:
    """What other papers report: a row for each network and source."""
    rows: dict[tuple[str, str], list[str]] = {}
    for (row, column), cell in claims.paper_cells(folder, "others").items():
        rows.setdefault((row, cell["source"]), []).append(f"{column}: {cell['value'] or 'not known'}")
    lines = [f"| {row} | {'<br>'.join(cells)} | {source} |" for (row, source), cells in rows.items()]
    return "\n".join(["| Whose, of what | Published | Where |", "|---|---|---|", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
