"""solvers <- guidance, rewards alone, difftune on top of all, and floors within each: nobody imports upwards."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "solvers": {"solvers"},
    "guidance": {"guidance", "solvers"},
    "rewards": {"rewards"},
    "difftune": {"difftune", "guidance", "rewards", "solvers"},
}

# A room (a folder or a module at the top of a package) imports those of lower floors alone; the ground floor is last.
FLOORS = {
    "solvers": [
        {"memory"},
        {"latent", "rollout"},
        {"exact", "families", "samplers"},
        {"denoiser", "levels", "ranges"},
        {"errors", "modules", "noise"},
    ],
    "guidance": [
        {"invert", "search"},
        {"attach", "guided", "guider"},
        {"branches", "methods"},
        {"codec", "contract", "files"},
    ],
    "rewards": [
        {"learned"},
        {"compose", "jpeg", "network", "sets", "simple", "world", "wrappers"},
        {"checks", "hub", "outside"},
        {"monitor", "registry"},
        {"catalogue", "errors"},
    ],
    "difftune": [
        {"__main__"},
        {"cli"},
        {"demo"},
        {"recipes"},
        {"rollouts"},
        {"evaluation", "reno", "search_runs", "training"},
        {"environment", "labelling", "pipelines"},
        {"files", "lookup", "models", "processes", "reports"},
        {"configs", "errors", "signals"},
    ],
}
HIGHEST = {"solvers": 5, "guidance": 5, "rewards": 5, "difftune": 9}
MOST_ROOMS = {"solvers": 12, "guidance": 12, "rewards": 15, "difftune": 20}
NO_ROOMS = {"__init__.py", "__pycache__", "py.typed", "lock.json", "weights", "examples", "templates"}


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_lies_below_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    upwards = {str(f.relative_to(ROOT)): imported(f) & set(MAY_IMPORT) - MAY_IMPORT[package] for f in files}
    assert not {file: names for file, names in upwards.items() if names}


def test_imports_are_found_wherever_they_are(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import torch.nn as nn\ndef f():\n    from difftune.models import path\n    import rewards.learned.clip\n"
    )
    assert imported(file) == {"torch", "difftune", "rewards"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_is_typed_and_says_whose_it_is(package):
    assert (ROOT / package / "py.typed").is_file()
    assert '__distribution__ = "difftune"' in (ROOT / package / "__init__.py").read_text()


def name_of(file: Path) -> str:
    """A file of a package as a module: solvers/families/sd.py is solvers.families.sd."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for package in MAY_IMPORT for file in sorted((ROOT / package).rglob("*.py"))}


def modules_imported(module: str) -> set[str]:
    """Our own modules that one imports anywhere in it, but not under `if TYPE_CHECKING`."""
    found, front = set(), [ast.parse(MODULES[module].read_text())]
    while front:
        node = front.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() if inner & MODULES.keys() else {node.module}
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            front += ast.iter_child_nodes(node)
    return found & MODULES.keys() - {module}


def room_of(module: str) -> tuple[str, str]:
    """(package, room) of a module below a package."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_its_floor(package):
    entries = {entry.name.removesuffix(".py") for entry in (ROOT / package).iterdir() if entry.name not in NO_ROOMS}
    assert entries == set().union(*FLOORS[package])
    assert len(FLOORS[package]) <= HIGHEST[package] and len(entries) <= MOST_ROOMS[package]


@pytest.mark.parametrize("package", FLOORS)
def test_every_folder_says_what_belongs_in_it_and_stands_in_the_picture_of_the_house(package):
    picture = (ROOT / "CONTRIBUTING.md").read_text().partition("## The house")[2].partition("```\n\n")[0]
    folders = [entry for entry in (ROOT / package).iterdir() if (entry / "__init__.py").is_file()]
    assert folders and [folder.name for folder in folders if f"{folder.name}/" not in picture] == []
    said = {folder.name: ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) for folder in folders}
    assert not [name for name, text in said.items() if not text]


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_lower_floors_alone(package):
    height = {room: -number for number, floor in enumerate(FLOORS[package]) for room in floor}
    inside = [module for module in MODULES if module.startswith(f"{package}.")]
    arrows = {(room_of(a)[1], room_of(b)[1]) for a in inside for b in modules_imported(a) if b in inside}
    assert len(arrows) > len(FLOORS[package])
    assert not sorted(f"{a} imports {b}" for a, b in arrows if a != b and height[a] <= height[b])


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: modules_imported(module) for module in MODULES}
    assert sum(map(len, graph.values())) > len(graph)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"a circle of imports: {' <- '.join(circle.args[1])}")


PUBLIC_CALLS = {"difftune.search_runs.search.search", "solvers.memory.budget.probe"}  # whose keywords users write


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The parameters that a caller gives."""
    own = function.args
    return len([a for a in (*own.posonlyargs, *own.args, *own.kwonlyargs) if a.arg not in ("self", "cls")])


def test_public_calls_alone_have_more_than_seven_parameters():
    long = {
        f"{module}.{node.name}"
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and parameters(node) > 7
    }
    assert long == PUBLIC_CALLS
