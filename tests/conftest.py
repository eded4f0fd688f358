"""Offline, and tests that need what is not here skip themselves and say what it is."""

import gc
import math
import os
import shutil
import zlib
from collections import defaultdict

os.environ["HF_HUB_OFFLINE"] = str(int(os.environ.get("DIFFTUNE_NETWORK") != "1"))  # before huggingface_hub is imported
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are tiny: threads would only wait for each other

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark `sampled(n)`, one case in n stays in the default suite; the others are slow."""
    families = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("sampled"):
            families[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    for (_, share), cases in families.items():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in cases[math.ceil(len(cases) / share) :]:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: the garbage collector need not look at it 5,000 times."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
    if item.get_closest_marker("network") and os.environ["HF_HUB_OFFLINE"] == "1":
        pytest.skip("needs the Hub, and gigabytes of weights: set DIFFTUNE_NETWORK=1")
    if item.get_closest_marker("browser") and not any(map(shutil.which, BROWSERS)):
        pytest.skip(f"needs Chromium: none of {', '.join(BROWSERS)} is on the PATH")


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers alone and after others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assembled models go to a folder of the test run, not to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def browser():
    """A real one."""
    from playwright.sync_api import sync_playwright

    path = next(found for name in BROWSERS if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
