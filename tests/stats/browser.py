"""A real headless Chromium for tests of pages; they skip where there is none."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser of playwright. It is found through $LACY_CHROMIUM, on the path, or where playwright installs its own.

    Of one module, since a loop of asyncio runs in this thread as long as it is open.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    named = os.environ.get("LACY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as started:
        found = named or started.chromium.executable_path
        if not os.path.exists(found):
            pytest.skip(f"needs Chromium: LACY_CHROMIUM names one, or one of {', '.join(NAMES)} is on the path")
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Any]]:
    """Opens a file, with options for the browser's context. At the end no page may have complained or asked for
    anything but itself."""
    contexts, complaints = [], []

    def visit(path: Path, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        address = path.resolve().as_uri()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: request.url.split("#")[0] != address and complaints.append(request.url))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
