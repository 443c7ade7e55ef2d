"""The browser of the other tests: which one is taken, and what a machine without one is told."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests import browser

pytestmark = pytest.mark.slow  # needs a browser


@pytest.fixture
def programs(tmp_path):
    for name in ("google-chrome", "chromium", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_chromium_comes_before_chrome(programs):
    assert browser.find_browser({"PATH": str(programs)}) == str(programs / "chromium")
    (programs / "chromium").unlink()
    assert browser.require_browser({"PATH": str(programs), "CI": "true"}) == str(programs / "google-chrome")


def test_the_one_that_is_named_is_taken(programs):
    env = {"PATH": str(programs), "DBB_CHROMIUM": str(programs / "mine")}
    assert browser.find_browser(env) == str(programs / "mine")
    with pytest.raises(ValueError, match="DBB_CHROMIUM='nope' must be a program"):
        browser.find_browser(env | {"DBB_CHROMIUM": "nope"})


@pytest.mark.parametrize("ci", [None, "", "0", "false"])
def test_without_one_the_test_is_skipped_with_the_remedy(tmp_path, ci):
    env = {"PATH": str(tmp_path)} | ({} if ci is None else {"CI": ci})
    with pytest.raises(pytest.skip.Exception, match=r"apt-get install chromium.*DBB_CHROMIUM"):
        browser.require_browser(env)


@pytest.mark.parametrize("ci", ["true", "1"])
def test_without_one_ci_fails(tmp_path, ci):
    with pytest.raises(pytest.fail.Exception, match=r"apt-get install chromium.*in CI a missing browser is a failure"):
        browser.require_browser({"PATH": str(tmp_path), "CI": ci})


def test_it_renders_a_page():
    with browser.browser() as chromium:
        page = chromium.new_page()
        page.set_content("<p id='a'>1 + 1</p>")
        assert page.evaluate("document.querySelector('#a').textContent.length") == 5


def test_it_reaches_this_machine_and_nothing_else(tmp_path):
    (tmp_path / "page.html").write_text("<title>here</title>")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browser.browser() as chromium:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/page.html")
        assert page.title() == "here"
        for far in ("http://192.0.2.1/", "https://example.org/"):
            with pytest.raises(Exception, match="ERR_PROXY_CONNECTION_FAILED"):
                page.goto(far)
        server.shutdown()
