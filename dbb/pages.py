"""The report of a run: a table of the notebooks and each of them as a page, readable with no network.

Formulas become MathML, which browsers draw themselves; no script and no style comes from elsewhere.
"""

import re
from html import escape
from pathlib import Path

from dbb.figures import write_atomically
from dbb.suite import Outcome, Project, discover, last_outcome

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5c6670; --line: #d5dae0; --page: #fff; --code: #f5f6f8;
  --link: #0b5cad; --bad: #b3261e; --good: #1a6b37; --word: #7a1fa2; --text: #0a6b4e; --number: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --dim: #9aa4ae; --line: #363c44; --page: #15181c;
  --code: #1e2227; --link: #7db7ff; --bad: #ff8a80; --good: #7fd69a; --word: #d3a4f5; --text: #84d6b4;
  --number: #f0b27a; } }
body { font: 16px/1.6 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
a { color: var(--link); } .anchor-link { visibility: hidden; padding-left: .3em; text-decoration: none; }
h1:hover .anchor-link, h2:hover .anchor-link, h3:hover .anchor-link { visibility: visible; }
h1, h2, h3 { line-height: 1.25; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: left;
  border-bottom: 1px solid var(--line); } td.n, th.n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
pre { margin: 0; font: 13.5px/1.5 ui-monospace, monospace; overflow-x: auto; }
code { font: .9em ui-monospace, monospace; background: var(--code); padding: .1em .3em; border-radius: 3px; }
pre code { background: none; padding: 0; }
.input { display: flex; background: var(--code); border-left: 3px solid var(--line); margin: 1rem 0 .5rem; }
.prompt { color: var(--dim); font: 12px/1.7 ui-monospace, monospace; min-width: 3.2rem; padding: .6rem 0 0 .6rem; }
.inner_cell { min-width: 0; flex: 1; } .code_cell .inner_cell { padding: .6rem .6rem .6rem 0; }
.output_area { display: flex; margin: .3rem 0; } .output_subarea { min-width: 0; overflow-x: auto; }
.output_png { background: #fff; } img { max-width: 100%; height: auto; }
.output_error { border-left: 3px solid var(--bad); padding-left: .6rem; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--dim); }
math[display=block] { margin: 1rem 0; overflow: auto hidden; padding-block: .2rem; } math { font-size: 1.08em; }
.ok { color: var(--good); } .FAILED { color: var(--bad); font-weight: 600; } .dim { color: var(--dim); }
.k, .kn, .ow, .kc { color: var(--word); } .s1, .s2, .sa, .sd, .si, .se { color: var(--text); }
.mi, .mf { color: var(--number); } .c1 { color: var(--dim); font-style: italic; }
.ansi-red-fg, .ansi-red-intense-fg { color: var(--bad); } .ansi-green-fg { color: var(--good); }
.ansi-bold { font-weight: 600; }
"""

TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{%- block output_area_prompt -%}<div class="prompt"></div>{%- endblock -%}
{%- block empty_in_prompt -%}{%- endblock -%}
{%- block in_prompt -%}<div class="prompt">[{{ cell.execution_count or ' ' }}]</div>{%- endblock -%}
{%- block data_latex -%}
<div class="output_subarea">{{ output.data['text/latex'] | markdown2html }}</div>
{%- endblock -%}
{%- block any_cell -%}
{%- if cell.metadata.get('jupyter', {}).get('source_hidden') -%}
<details><summary>solution</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
"""

ROW = """<tr><td>{page}</td><td class="n">{time}</td><td class="n">{cells}</td><td class="n">{checks}</td>
<td class="n">{figures}</td><td class="{status}">{status}</td><td class="dim">{when}</td><td>{file}</td></tr>"""

HEAD = """<tr><th>notebook</th><th class="n">time</th><th class="n">cells</th><th class="n">checks</th>
<th class="n">figures</th><th>status</th><th>last run</th><th></th></tr>"""


def write(project: Project, build: Path | None = None) -> Path:
    """Write `build/report/index.html` and a page for each notebook that has run; return the path of the index."""
    build = build or project.build
    folder = build / "report"
    outcomes = {path: last_outcome(build, path.stem) for path in discover(project)}
    for path, outcome in outcomes.items():
        if outcome:
            page = _page(outcome.title or path.stem, _render(build / "notebooks" / path.name), outcome)
            write_atomically(folder / f"{path.stem}.html", page.encode())
    write_atomically(folder / "index.html", _index(outcomes).encode())
    return folder / "index.html"


def mathml(source: str, block: bool = False) -> str:
    """Turn a formula in TeX into MathML; what cannot be converted is shown as it was written."""
    from latex2mathml.converter import convert

    source = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{split}", source)  # the same to a reader; `aligned` is not known
    try:
        return convert(source, display="block" if block else "inline")
    except Exception:  # the converter fails in many ways, all of them meaning the same
        return f"<code>{escape(source)}</code>"


def _render(path: Path) -> str:
    """Render an executed notebook as the body of a page."""
    body, _ = _exporter()(template_name="basic", raw_template=TEMPLATE).from_filename(str(path))
    return re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', body)  # from page to page, not out into files


def _exporter():
    """Return nbconvert's HTML exporter with formulas drawn as MathML; imported late, nbconvert takes a second."""
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body):
            return mathml(body)

        def block_math(self, body):
            return mathml(body, block=True)

        def latex_environment(self, name, body):
            return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", block=True)

    class Exporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context, source):
            attachments = context.get("cell", {}).get("attachments", {})
            return MarkdownWithMath(renderer=Renderer(escape=False, attachments=attachments)).render(source)

    return Exporter


def _page(title: str, body: str, outcome: Outcome | None = None) -> str:
    error = f'<p class="FAILED">Failed in {escape(str(outcome.error))}</p>' if outcome and outcome.error else ""
    back = '<p><a href="index.html">all notebooks</a></p>' if outcome else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>{back}{error}\n{body}\n</body></html>\n"
    )


def _index(outcomes: dict[Path, Outcome | None]) -> str:
    rows = "\n".join(_row(path, outcome) for path, outcome in outcomes.items())
    done = [outcome for outcome in outcomes.values() if outcome]
    failed = sum(outcome.error is not None for outcome in done)
    checks, seconds = sum(outcome.checks for outcome in done), sum(outcome.seconds for outcome in done)
    summary = f"{len(done)} of {len(outcomes)} run, {failed} failed, {checks} checks, {seconds:.0f} s of notebooks."
    return _page("Notebooks", f"<h1>Notebooks</h1><p>{summary}</p><table>{HEAD}\n{rows}</table>")


def _row(path: Path, outcome: Outcome | None) -> str:
    if outcome is None:
        empty = dict.fromkeys(("time", "cells", "checks", "figures", "status", "file"), "")
        return ROW.format(page=escape(path.stem), when="not run yet", **empty)
    title = escape(outcome.title or path.stem)  # a title begins with the number, too
    return ROW.format(
        page=f'<a href="{path.stem}.html">{title}</a>',
        time=f"{outcome.seconds:.1f} s",
        cells=outcome.cells,
        checks=outcome.checks,
        figures=len(outcome.figures),
        status=outcome.status,
        when=f"{outcome.finished}, {outcome.profile}",
        file=f'<a href="../notebooks/{path.name}">ipynb</a>',
    )
