"""Offline, and tests that need what is not here skip themselves and say what it is."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are tiny: threads would only wait for each other

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
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
