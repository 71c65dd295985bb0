"""A real headless browser for tests: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

_QUIET = [  # nothing of the browser's own goes out to the network
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
]  # fmt: skip


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, from `SPEEDER_BROWSER` or the path; the test is skipped without one, but fails where CI is set."""
    found = os.environ.get("SPEEDER_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium on the path; .ci/run installs it")
        pytest.skip("no chromium on the path; install it, or name one by SPEEDER_BROWSER")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found, args=[*_QUIET, *as_root], timeout=120_000
        )
        try:
            yield chromium
        finally:
            chromium.close()
