"""The site: built without a warning, complete, whole without a network, and readable for everybody."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from dbb import claims, figures, suite
from dbb import notebook as nb
from tests.browser import browser
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # builds the site and visits it, in a browser

BUILD = ROOT / "docs/build.py"
NOTEBOOKS = [path.stem for path in suite.discover(suite.Project(ROOT))]
SCREENS = {"a wide screen, light": (1280, "light"), "a phone, dark": (390, "dark")}
VISITED = ("index", "notebooks/05_average_pooling", "api/blocks", "results", "cli", "which")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make site` builds it, from the outputs that are committed."""
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, str(BUILD), "--stored", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def chromium():
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("site_builder", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """What a page links to and what can be linked to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.targets, self.ids, self.pictures = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        self.ids |= {facts[name] for name in ("id", "name") if facts.get(name)}
        self.targets += [facts[name] for name in ("href", "src") if facts.get(name)]
        if tag == "img":
            self.pictures.append(facts)


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pages(site: Path) -> list[Path]:
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


# What is in it


def test_every_notebook_has_a_page_and_a_card(site):
    assert NOTEBOOKS and [name for name in NOTEBOOKS if not (site / f"notebooks/{name}.html").exists()] == []
    front = (site / "index.html").read_text()
    cards = re.findall(r'class="sd-card .*?href="notebooks/(\w+)\.html"', front, re.DOTALL)
    assert cards == NOTEBOOKS


def test_pages_lead_to_files_and_anchors_that_exist(site):
    missing = []
    for path in pages(site):
        for target in page(path).targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not file.is_file() or (anchor and file.suffix == ".html" and anchor not in page(file).ids):
                missing.append(f"{path.relative_to(site)} -> {target}")
    assert missing == []


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)")
    assert [found for path in pages(site) for found in loaded.findall(path.read_text())] == []
    styles = [path for path in site.rglob("*.css") if re.search(r"url\(['\"]?(https?:)?//", path.read_text())]
    assert styles == []


def test_every_picture_says_what_it_shows(site):
    silent = [
        f"{path.relative_to(site)}: {picture.get('src')}"
        for path in pages(site)
        for picture in page(path).pictures
        if not (picture.get("alt") or "").strip() or picture["alt"] == picture.get("src")
    ]
    assert silent == []


def test_figures_bring_their_alt_texts(site):
    for figure in figures.read_manifest(ROOT / "figures"):
        alts = [picture["alt"] for picture in page(site / f"notebooks/{figure.notebook}.html").pictures]
        assert any(figure.alt in alt for alt in alts), figure.file


def test_solutions_are_folded(site):
    for path in suite.discover(suite.Project(ROOT)):
        solutions = [cell for cell in nb.read(path).cells if "solution" in nb.tags(cell)]
        text = (site / f"notebooks/{path.stem}.html").read_text()
        assert text.count("Show a solution") == len(solutions) > 0


def test_each_notebook_says_how_to_run_it(site):
    for name in NOTEBOOKS:
        text = re.sub(r"<[^>]+>", "", (site / f"notebooks/{name}.html").read_text())
        for words in ("make lab", f"dbb run {name[:2]}", f"localhost:8888/lab/tree/{name}.ipynb", "Colab", "git clone"):
            assert words in text, (name, words)
        assert list(site.glob(f"_downloads/*/{name}.ipynb"))


def test_the_ledger_stands_there_whole(site):
    text = re.sub(r"<[^>]+>", "", (site / "results.html").read_text())
    found = claims.evaluate(ROOT, claims.ledger(ROOT))
    assert [f.claim.id for f in found if f"({f.claim.id}" not in text] == []
    assert all(text.count(status) >= sum(f.status == status for f in found) for status in claims.STATUSES)


def test_the_reference_is_typed_and_leads_to_the_source(site):
    text = (site / "api/blocks.html").read_text()
    assert re.search(r'id="dbb\.blocks\.DiverseBranchBlock"', text)
    assert "internal_channels" in text and "_modules/dbb/blocks.html#DiverseBranchBlock" in text
    assert re.search(r"Parameters.*?where", (site / "api/models.html").read_text(), re.DOTALL)


def test_every_module_of_the_package_has_its_place(site):
    private = {"__init__", "__main__", "cli", "runner"}  # the command line has a page of its own
    modules = {path.stem for path in (ROOT / "dbb").glob("*.py")} - private
    text = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    documented = set(re.findall(r'id="module-dbb\.(\w+)"', text))
    assert {name for name in modules if not name.startswith("_")} - documented == set()


def test_every_command_is_explained(site):
    from dbb.cli import parser

    (commands,) = [action.choices for action in parser()._actions if hasattr(action, "choices") and action.choices]
    text = re.sub(r"<[^>]+>", "", (site / "cli.html").read_text())
    assert [name for name in commands if f"dbb {name} [-h]" not in text] == []


# How it is built


def test_a_repository_on_github_gives_links_to_colab(builder, monkeypatch):
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/suite")
    text = builder.run_it("03_sequential_convs.ipynb", builder.repository(ROOT))
    assert (
        "https://colab.research.google.com/github/someone/suite/blob/main/notebooks/03_sequential_convs.ipynb" in text
    )
    assert "git clone --quiet https://github.com/someone/suite.git" in text
    assert "{" not in re.sub(r"\{(download|dropdown)\}", "", text)


@pytest.mark.parametrize(
    "origin, name",
    [
        ("https://github.com/a/b.git", "a/b"),
        ("git@github.com:a/b.c", "a/b.c"),
        ("/somewhere/else", "OWNER/NAME"),
    ],
)
def test_the_repository_is_that_of_the_clone(builder, monkeypatch, tmp_path, origin, name):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", origin], check=True)
    assert builder.repository(tmp_path) == name


def test_only_stale_notebooks_run_again(builder, monkeypatch, tmp_path):
    project = suite.Project(tmp_path)
    for folder in ("notebooks", "build/notebooks", "dbb", "data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dbb/affine.py").write_text("")
    old, new = tmp_path / "notebooks/01_old.ipynb", tmp_path / "notebooks/02_new.ipynb"
    for path in (old, new):
        path.write_text("{}")
    (project.build / "notebooks/01_old.ipynb").write_text("{}")
    ran = []
    last = SimpleNamespace(error=None, profile="quick")
    monkeypatch.setattr(suite, "last_outcome", lambda build, name: last)
    monkeypatch.setattr(suite, "run", lambda project, names, **_: ran.append(names) or [])
    assert builder.run_stale(project, 1) and ran == [["02_new"]]
    (tmp_path / "dbb/affine.py").write_text("# changed")
    assert builder.run_stale(project, 1) and ran[1:] == [["01_old", "02_new"]]


def test_a_notebook_that_fails_stops_the_site(builder, monkeypatch, capsys):
    failed = SimpleNamespace(error="cell 3: ValueError: no", notebook="01_old")
    monkeypatch.setattr(suite, "run", lambda *_, **__: [failed])
    monkeypatch.setattr(suite, "last_outcome", lambda *_: None)
    monkeypatch.setattr(suite, "complaint", lambda outcome: f"{outcome.notebook} failed")
    assert builder.main([]) == 1
    assert "01_old failed" in capsys.readouterr().err


def test_a_warning_stops_the_site(builder, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/index.md").write_text("# Title\n\n[nowhere](missing.md)\n")
    assert builder.build(tmp_path / "source", tmp_path / "out") != 0


# As its readers see it


def visit(chromium, address: str, screen: str = "a wide screen, light"):
    """A page in the browser, and what went wrong on it or was asked of another machine."""
    width, scheme = SCREENS[screen]
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view, trouble = context.new_page(), []
    view.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("requestfailed", lambda request: trouble.append(f"failed: {request.url}"))
    view.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(f"asked: {r.url}"))
    view.goto(address)
    return view, trouble


@pytest.mark.parametrize("name", [f"notebooks/{name}" for name in NOTEBOOKS])
def test_a_page_shows_its_pictures_and_formulas(site, chromium, name):
    view, trouble = visit(chromium, (site / f"{name}.html").as_uri())
    view.wait_for_function("() => window.MathJax?.startup?.promise")
    view.evaluate("() => MathJax.startup.promise")
    empty = "() => [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
    assert view.evaluate(empty) == []
    formulas = view.locator(".math").count()
    assert formulas > 0 and view.locator(".math mjx-container svg").count() >= formulas
    assert view.locator("mjx-merror, [data-mml-node=merror]").count() == 0
    assert trouble == []
    view.context.close()


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", VISITED)
def test_everybody_can_read_it(site, chromium, name, screen):
    from axe_playwright_python.sync_playwright import Axe

    view, trouble = visit(chromium, (site / f"{name}.html").as_uri(), screen)
    view.wait_for_timeout(500)
    assert trouble == []  # axe itself asks for the styles again, which a page that is a file may not
    found = Axe().run(view).response["violations"]
    serious = [
        f"{v['id']}: {v['nodes'][0]['html'][:200]} ({len(v['nodes'])} places)"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    width = view.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "the page is wider than the screen"
    shots = ROOT / "build/site-screens"
    shots.mkdir(parents=True, exist_ok=True)
    view.screenshot(path=shots / f"{name.replace('/', '-')}-{screen.replace(', ', '-').replace(' ', '-')}.png")
    view.context.close()


def test_search_finds_average_pooling(site, chromium):
    view, trouble = visit(chromium, (site / "index.html").as_uri())
    view.get_by_placeholder("Search").first.fill("average pooling")
    view.keyboard.press("Enter")
    view.wait_for_selector("#search-results li a")
    view.wait_for_timeout(500)
    found = view.locator("#search-results li > a").all_inner_texts()
    assert "05 · Transform V: average pooling is a convolution" in found
    assert trouble == []
    view.context.close()


def test_a_solution_opens_on_a_click_and_by_keyboard(site, chromium):
    view, _ = visit(chromium, (site / "notebooks/05_average_pooling.html").as_uri())
    summary = view.locator("details.hide > summary", has_text="Show a solution").first
    code = view.locator("details.hide .cell_input").first
    assert not code.is_visible()
    summary.click()
    assert code.is_visible() and "# A solution." in code.inner_text()
    view.locator("details.hide > summary").first.press("Enter")
    assert not code.is_visible()
    view.context.close()
