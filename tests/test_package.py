"""The package: its version everywhere the same, and a wheel that works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import difftune

ROOT = Path(__file__).parents[1]
PACKAGES = ("difftune", "guidance", "rewards", "solvers")
LIMIT = 47e6  # bytes of the wheel


def test_citation_and_changelog_are_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (cited["version"], cited["date-released"]) == newest.groups()
    assert cited["version"] == difftune.__version__


def run(*words: object, **options) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with the wheel and the source archive, built from a copy of the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", source)
    return source / "dist"


@pytest.fixture(scope="module")
def environment(dist, tmp_path_factory):
    """A fresh virtual environment with the wheel, which sees the dependencies of this one but not the repository."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (wheel,) = dist.glob("*.whl")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(outer)))  # an editable install there is not followed
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    """How to run a command in an empty folder, offline and without the repository on the path."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {"cwd": tmp_path, "env": inherited | {"HF_HUB_OFFLINE": "1"}}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages_and_is_small(dist):
    (wheel,) = dist.glob("*.whl")
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {
        str(file.relative_to(ROOT))
        for name in PACKAGES
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == ours
    assert wheel.stat().st_size < LIMIT
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())


@pytest.mark.slow
def test_the_installed_package_is_the_wheel_s(environment, elsewhere):
    code = "import difftune, guidance, rewards, solvers; print(difftune.__file__)"
    assert Path(run(environment / "bin" / "python", "-c", code, **elsewhere).strip()).is_relative_to(environment)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_doctor_and_demo_run_from_the_wheel_alone(environment, elsewhere, tmp_path):
    program = environment / "bin" / "difftune"
    assert difftune.__version__ in run(program, "doctor", **elsewhere)
    run(program, "demo", "--output_dir", "demo", **elsewhere)
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
    assert (tmp_path / "demo" / "metrics.json").exists()
