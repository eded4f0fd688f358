import subprocess
import sys
from pathlib import Path

import pytest

import difftune

ROOT = Path(__file__).parent.parent


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that sees `path` before the repository."""
    at = [str(folder) for folder in (*path, ROOT)]
    code = f"import sys; sys.path[:0] = {at!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)


def test_import_loads_next_to_nothing_and_leaves_torch_alone():
    code = (
        "before = len(sys.modules); import difftune; print(len(sys.modules) - before)\n"
        "import difftune.models, rewards.registry; difftune.REWARDS, difftune.MODELS\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'open_clip') if m in sys.modules])"
    )
    loaded, heavy = python(code).stdout.split("\n")[:2]
    assert heavy == "[]"
    assert int(loaded) < 100  # which takes 5 ms, where the time would be that of the machine


@pytest.mark.parametrize("name", difftune.__all__)
def test_public_name_is_there(name):
    assert getattr(difftune, name) is not None
    assert name in dir(difftune)


def test_unknown_public_name_lists_the_known():
    with pytest.raises(AttributeError, match=r"no 'atach'; it has .*attach"):
        difftune.atach  # noqa: B018


def test_overlaid_package_is_named(tmp_path):
    (tmp_path / "guidance").mkdir()
    (tmp_path / "guidance" / "__init__.py").write_text("")
    told = python("import difftune", tmp_path).stderr.strip().splitlines()[-1]
    assert told.startswith("ImportError: the package 'guidance' of difftune is overlaid by ")
    assert str(tmp_path) in told
    assert "pip install --force-reinstall" in told


def test_overlaying_distribution_is_named(tmp_path):
    """A distribution that says it installed `rewards` is what the sentence names."""
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("")
    info = tmp_path / "rewards_gym-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rewards-gym\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("rewards\n")
    told = python("import difftune", tmp_path).stderr.strip().splitlines()[-1]
    assert "'rewards' of difftune is overlaid by the distribution rewards-gym" in told
    assert "pip uninstall rewards-gym" in told
