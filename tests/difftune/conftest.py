"""A real browser."""

import shutil

import pytest

from tests.conftest import BROWSERS


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(found for name in BROWSERS if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
