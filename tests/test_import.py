import ast
import subprocess
import sys
from pathlib import Path

import pytest

import difftune
from tests.test_layering import MODULES

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


HELP = (
    "from difftune.cli.program import cli\n"
    "for words in ([], ['sample'], ['train', 'alignprop'], ['search'], ['rewards', 'list']):\n"
    "    cli([*words, '--help'], standalone_mode=False)\n"
    "heavy = ('torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'PIL', 'scipy', 'yaml')\n"
    "print(len(sys.modules), [m for m in heavy if m in sys.modules])"
)


def test_help_loads_few_modules_and_none_of_the_heavy_ones():
    """220 when this was written, of which 80 are the interpreter's: 0.2 s of CPU, which no test can measure."""
    loaded, heavy = python(HELP).stdout.splitlines()[-1].split(" ", 1)
    assert heavy == "[]" and int(loaded) < 250


LIGHT = ["difftune.evaluation.score", "guidance.methods.catalogue", "guidance.search.catalogue", "difftune.lookup"]
MODELS = {"accelerate", "diffusers", "peft", "transformers"}  # 3 to 7 s of CPU to import


def imported_at_once(module: str) -> set[str]:
    """The modules that importing one imports, ours with all that they import, and others by their first name."""
    found, front = {module}, [module]
    while front:
        for node in ast.parse(MODULES[front.pop()].read_text()).body:
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                named += [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            new = {name if name in MODULES else name.partition(".")[0] for name in named} - found
            found |= new
            front += [name for name in new if name in MODULES]
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_what_draws_no_picture_imports_no_library_of_models(module):
    """`difftune score`, `difftune methods` and what checks the names of the settings."""
    assert "torch" in imported_at_once(module) and not imported_at_once(module) & MODELS
    assert imported_at_once("difftune.pipelines.generate") & MODELS


@pytest.mark.parametrize("name", difftune.__all__)
def test_public_name_is_there(name):
    assert getattr(difftune, name) is not None
    assert name in dir(difftune)


@pytest.mark.parametrize("name", difftune.GUIDANCE)
def test_every_method_is_a_public_name(name):
    """The class that `difftune methods` and the method's page name is imported from difftune."""
    assert getattr(difftune, difftune.GUIDANCE[name].__name__) is difftune.GUIDANCE[name]


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
