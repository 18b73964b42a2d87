"""A real browser for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright


@contextmanager
def chromium(*, flags: Sequence[str] = ()) -> Iterator[Browser]:
    """The Chromium that is installed; without one the test is skipped.

    Args:
        flags: of its command line, beside what lets it run as root.
    """
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *flags])
        yield started
        started.close()
