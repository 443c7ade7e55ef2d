"""A browser for the tests that look at a page as its reader does: an installed Chromium, driven by playwright.

Playwright's own download of a browser is not used. Without a browser these tests are skipped, with the remedy; in CI
(the environment variable `CI` is set) they fail, since there nobody reads what was skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("background-networking", "component-update", "sync", "gpu")  # no calls home, no graphics card
OFFLINE = "--proxy-server=127.0.0.1:9"  # nobody answers there, and only this machine itself is reached without it
FLAGS = ("--no-sandbox", "--no-first-run", OFFLINE, *(f"--disable-{name}" for name in QUIET))
REMEDY = (
    "no browser: install Chromium (`apt-get install chromium`) or Chrome, or name one that is not on PATH in "
    "DBB_CHROMIUM"
)


def find_browser(env: Mapping[str, str] = os.environ) -> str | None:
    """Return the path of a browser: the one that `DBB_CHROMIUM` names, else the first on PATH, else None.

    Raises ValueError where `DBB_CHROMIUM` names none: whoever sets it means it.
    """
    if named := env.get("DBB_CHROMIUM"):
        if found := shutil.which(named, path=env.get("PATH")):
            return found
        raise ValueError(f"DBB_CHROMIUM={named!r} must be a program: give its path, or unset it")
    return next(filter(None, (shutil.which(name, path=env.get("PATH")) for name in NAMES)), None)


def require_browser(env: Mapping[str, str] = os.environ) -> str:
    """Return the path of a browser; where there is none skip the test, and in CI fail it."""
    if found := find_browser(env):
        return found
    if env.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip(REMEDY)
    pytest.fail(f"{REMEDY} (in CI a missing browser is a failure)", pytrace=False)


@contextmanager
def browser() -> Iterator[Browser]:
    """Launch a browser without a window; on the way out it is closed with all its pages.

    One at a time in a process: while it is open, playwright's event loop runs in this thread.
    """
    path = require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield launched
        finally:
            launched.close()
