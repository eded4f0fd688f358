"""Mutants: one small change of the code at a time, and whether the tests notice it.

    python scripts/mutate.py --count 64 --seed 0 --results mutants.jsonl --table mutants.md

A mutant changes a sign, a factor, an index, a comparison or an end by one. It runs the tests that
`scripts/mutants.json` names for its file, in a copy of the tree and in a process of its own, which ends at the first
failure or at the time limit: then it is killed. That test must pass without the change. A mutant that survives
changes nothing that can be seen, and is named with its reason in `scripts/mutants.json`, or is a missing test: the exit
status is 1 if fewer than 95 % of the others are killed. With `--results`, what that file says was killed is not tried
again. `--reversed` tries the signs that the file names, each of which would train a recipe backwards.
"""

import argparse
import ast
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).with_suffix("").parent / "mutants.json"
COPIED = ("difftune", "guidance", "rewards", "solvers", "tests", "scripts", "docs", "pyproject.toml", "README.md")

SIGNS = {ast.Add: (ast.Sub, "sign"), ast.Sub: (ast.Add, "sign")}
FACTORS = {ast.Mult: (ast.Div, "factor"), ast.Div: (ast.Mult, "factor")}
ENDS = {
    ast.Lt: (ast.LtE, "off by one"),
    ast.LtE: (ast.Lt, "off by one"),
    ast.Gt: (ast.GtE, "off by one"),
    ast.GtE: (ast.Gt, "off by one"),
}
OPERATORS = {**SIGNS, **FACTORS}


@dataclass(frozen=True)
class Mutant:
    """A change of one expression: the `nth` of its function with this text, the one at `place` of all in its file."""

    file: str
    function: str
    kind: str  # "sign", "factor", "index", "off by one"
    line: int
    place: int
    before: str
    after: str
    nth: int = 1

    @property
    def key(self) -> str:
        """What names it in `mutants.json`, wherever its line is."""
        nth = f" #{self.nth}" if self.nth > 1 else ""
        return f"{self.file}::{self.function}: {self.before} -> {self.after}{nth}"

    @property
    def room(self) -> str:
        """The folder that the table counts it under."""
        parts = self.file.split("/")
        return "/".join(parts[: min(2, len(parts) - 1)])


class Reversed(NamedTuple):
    """A reversed sign that `mutants.json` names: a text that stands once in its file, and what takes its place."""

    file: str
    before: str
    after: str
    tests: list[str]
    kind: str = "reversed"

    @property
    def key(self) -> str:
        return f"{self.file}: {self.before} -> {self.after}"

    def changed(self, source: str) -> str:
        """The file with the change. ValueError unless the text stands there once."""
        if source.count(self.before) != 1:
            raise ValueError(f"{self.before!r} stands {source.count(self.before)} times in {self.file}")
        return source.replace(self.before, self.after)


def changes(tree: ast.Module) -> Iterator[tuple[str, str, ast.AST, ast.AST]]:
    """(function, kind, an expression in the tree, what takes its place) for every mutant, in the order of the file."""
    for function, node in _inside(tree, "", False):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _text(node):
            operator, kind = OPERATORS[type(node.op)]
            yield function, kind, node, ast.BinOp(node.left, operator(), node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Pow) and _number(node.right):
            yield function, "factor", node, ast.BinOp(node.left, node.op, ast.Constant(node.right.value + 1))
        if (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.Constant)
        ):
            yield function, "sign", node, node.operand
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in ENDS:
            operator, kind = ENDS[type(node.ops[0])]
            yield function, kind, node, ast.Compare(node.left, [operator()], node.comparators)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _index(node.slice) is not None:
            moved = ast.Constant(_index(node.slice) + 1)
            yield function, "index", node, ast.Subscript(node.value, moved, node.ctx)


def _inside(node: ast.AST, function: str, on: bool) -> Iterator[tuple[str, ast.AST]]:
    """(function, node) for what stands in functions, without annotations, decorators, messages and asserts."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                continue
            named = isinstance(child, ast.FunctionDef | ast.ClassDef)
            inner = f"{function}.{child.name}".lstrip(".") if named else function
            inside = on or isinstance(child, ast.FunctionDef)
            if inside and not named:
                yield inner, child
            yield from _inside(child, inner, inside)


def _number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _text(node: ast.BinOp) -> bool:
    return any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _index(node: ast.AST) -> int | None:
    """The whole number that an index is."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _number(node.operand):
        return -node.operand.value
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a file."""
    found, seen = [], Counter()
    for place, (function, kind, node, other) in enumerate(changes(ast.parse(source))):
        before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(ast.copy_location(other, node)))
        seen[function, before, after] += 1
        found.append(Mutant(file, function, kind, node.lineno, place, before, after, seen[function, before, after]))
    return found


def mutated(source: str, mutant: Mutant) -> str:
    """The file with the change; only the expression's own text differs."""
    for place, (_, _, node, _) in enumerate(changes(ast.parse(source))):
        if place == mutant.place:
            lines = source.splitlines(keepends=True)
            start = sum(len(line) for line in lines[: node.lineno - 1]) + _column(
                lines[node.lineno - 1], node.col_offset
            )
            end = sum(len(line) for line in lines[: node.end_lineno - 1])
            end += _column(lines[node.end_lineno - 1], node.end_col_offset)
            return f"{source[:start]}({mutant.after}){source[end:]}"
    raise ValueError(f"no place {mutant.place} in {mutant.file}: its source is another one")


def _column(line: str, offset: int) -> int:
    """`offset` in bytes, in characters."""
    return len(line.encode()[:offset].decode())


def tests_for(file: str, table: dict[str, list[str]]) -> list[str]:
    """The tests of the longest prefix of the file's name that the table has."""
    prefix = max((p for p in table if file.startswith(p)), key=len, default=None)
    return [] if prefix is None else table[prefix]


def drawn(count: int, seed: int, table: dict[str, list[str]]) -> list[Mutant]:
    """`count` mutants of the files that have tests, in turn from each room.

    Each has a number of its own, by its key and the seed, and the lowest are drawn: a change of other code draws the
    same ones.
    """
    rooms: dict[str, list[Mutant]] = {}
    for file in files_of(table):
        for mutant in mutants(file, (ROOT / file).read_text()):
            rooms.setdefault(mutant.room, []).append(mutant)
    number = lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).hexdigest()  # noqa: E731
    shelves = [sorted(rooms[room], key=number) for room in sorted(rooms)]
    turns = [shelf[i] for i in range(max(map(len, shelves), default=0)) for shelf in shelves if i < len(shelf)]
    return turns[:count]


def files_of(table: dict[str, list[str]]) -> list[str]:
    """The Python files that a prefix of the table names."""
    folders = sorted({prefix.split("/")[0] for prefix in table})
    files = [str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / folder).glob("**/*.py"))]
    return [file for file in files if tests_for(file, table)]


class Ran(NamedTuple):
    result: str  # "killed", "survived" or "timeout"
    seconds: float  # of the CPU
    failed: str  # the test that failed


class Noted:
    """A pytest plugin that writes the first failure's name to a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run(tree: Path, tests: list[str], limit: int) -> Ran:
    """The tests in a forked process, which has torch imported."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "failed")
        child = os.fork()
        if child == 0:
            _test(tree, tests, limit, str(note))
        _, status, used = os.wait4(child, 0)
        failed = note.read_text() if note.exists() else ""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return Ran("timeout", limit, failed)
    return Ran("survived" if status == 0 else "killed", used.ru_utime + used.ru_stime, failed)


def _test(tree: Path, tests: list[str], limit: int, note: str) -> None:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))  # of the CPU: a busy machine kills no mutant
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-o", "timeout=900", "-W", "ignore", "--no-header"]
    options += ["-m", "sampled or not slow"]
    os._exit(int(pytest.main([*options, *tests], plugins=[Noted(note)])))


def copied(folder: str) -> Path:
    """The files of the tree that git knows, in a folder."""
    names = subprocess.check_output(["git", "ls-files", *COPIED], cwd=ROOT, text=True).split()
    for name in names:
        if (ROOT / name).is_file():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)
    return Path(folder)


def tried(mutant: Mutant | Reversed, tree: Path, tests: list[str], limit: int) -> Ran:
    """What the tests say of one mutant; the tree is as before afterwards."""
    file = tree / mutant.file
    source = file.read_text()
    try:
        file.write_text(mutant.changed(source) if isinstance(mutant, Reversed) else mutated(source, mutant))
        return run(tree, tests, limit)
    finally:
        file.write_text(source)


Result = tuple[Mutant, str]


def table_of(results: list[Result], equivalent: dict[str, str]) -> str:
    """Killed, equivalent and surviving mutants of each kind in each room, as a table in Markdown."""
    kinds = sorted({mutant.kind for mutant, _ in results})
    rows = [f"| room | {' | '.join(kinds)} | killed | equivalent | survived |", "|---" * (len(kinds) + 4) + "|"]
    rooms = sorted({mutant.room for mutant, _ in results})
    for name, mine in [(r, [x for x in results if x[0].room == r]) for r in rooms] + [("all", results)]:
        cells = [_cell([x for x in mine if x[0].kind == kind], equivalent) for kind in kinds]
        killed, counted, survivors = summary(mine, equivalent)
        rows.append(f"| {name} | {' | '.join(cells)} | {killed} | {len(mine) - counted} | {len(survivors)} |")
    return "\n".join(rows)


def _cell(results: list[Result], equivalent: dict[str, str]) -> str:
    """Killed of those that change behaviour."""
    killed, counted, _ = summary(results, equivalent)
    return f"{killed} of {counted}" if results else ""


def list_of(results: list[Result], equivalent: dict[str, str]) -> str:
    """Every mutant and what became of it, as a table in Markdown."""
    rows = ["| file | function | kind | change | result |", "|---|---|---|---|---|"]
    for mutant, result in sorted(results, key=lambda r: (r[0].file, r[0].line, r[0].place)):
        change = f"`{mutant.before}` -> `{mutant.after}`".replace("|", "\\|").replace("\n", " ")
        said = f"equivalent: {equivalent[mutant.key]}" if mutant.key in equivalent and result == "survived" else result
        rows.append(f"| {mutant.file} | {mutant.function} | {mutant.kind} | {change} | {said} |")
    return "\n".join(rows)


def summary(results: list[Result], equivalent: dict[str, str]) -> tuple[int, int, list[Mutant]]:
    """(killed, those that change behaviour, survivors that nobody has explained)."""
    same = [m for m, result in results if result == "survived" and m.key in equivalent]
    open_ = [m for m, result in results if result == "survived" and m.key not in equivalent]
    counted = len(results) - len(same)
    return counted - len(open_), counted, open_


def known(file: Path | None) -> dict[str, str]:
    """key -> result of the mutants that a former run killed."""
    if file is None or not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["key"]: row["result"] for row in rows if row["result"] != "survived"}


class Runner:
    """Tries mutants in a copy of the tree, whose tests must pass as it is."""

    def __init__(self, tree: Path, table: dict[str, list[str]], limit: int, file: Path | None) -> None:
        self.tree, self.table, self.limit, self.file = tree, table, limit, file
        self.whole: set[tuple[str, ...]] = set()

    def __call__(self, mutant: Mutant | Reversed) -> str:
        before = known(self.file)  # read anew: several may run at a time
        if mutant.key in before:
            return before[mutant.key]
        tests = mutant.tests if isinstance(mutant, Reversed) else tests_for(mutant.file, self.table)
        result, seconds, failed = tried(mutant, self.tree, tests, self.limit)
        if result != "survived":
            self.check([failed] if failed and isinstance(mutant, Mutant) else tests)  # a slow one needs its own -m
        print(f"{result:8} {seconds:5.1f} s  {mutant.key}", flush=True)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"key": mutant.key, "result": result, "seconds": round(seconds, 1)}) + "\n")
        return result

    def check(self, tests: list[str]) -> None:
        """Raises SystemExit if the tests fail without a mutant, too: they would kill every one."""
        if tuple(tests) not in self.whole:
            alone = run(self.tree, tests, self.limit)
            if alone.result != "survived":
                sys.exit(f"{alone.failed or tests} fails without a mutant, too: {alone.result}")
            self.whole.add(tuple(tests))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=200, help="seconds of CPU that one mutant's tests may take")
    parser.add_argument("--only", default="", help="the start of the files' names")
    parser.add_argument("--reversed", action="store_true", help="the signs that mutants.json names, in their place")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to go on from and to add to")
    parser.add_argument("--table", type=Path, help="a Markdown file to write")
    chosen = parser.parse_args(arguments)
    data = json.loads(DATA.read_text())
    table = {prefix: tests for prefix, tests in data["tests"].items() if prefix.startswith(chosen.only)}
    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        runner = Runner(copied(folder), table, chosen.limit, chosen.results)
        if chosen.reversed:
            return int(any([runner(Reversed(**change)) == "survived" for change in data["reversed"]]))
        results = [(mutant, runner(mutant)) for mutant in drawn(chosen.count, chosen.seed, table)]
    return report(results, data["equivalent"], chosen.table)


def preload() -> None:
    """Imports once what all children would: none of it is ours."""
    import diffusers
    import pytest  # noqa: F401
    import torch
    import transformers

    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusion3Pipeline"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer", "T5EncoderModel"):
        getattr(transformers, name)
    torch.set_num_threads(1)


def report(results: list[Result], equivalent: dict[str, str], file: Path | None) -> int:
    """Prints the table and the survivors, and writes them with the list of all; 1 if below 95 %."""
    killed, counted, survivors = summary(results, equivalent)
    same = len(results) - counted
    line = f"{killed} of {counted} mutants that change behaviour were killed; {same} change nothing."
    print(table_of(results, equivalent), line, *(f"survived: {m.key}" for m in survivors), sep="\n")
    if file is not None:
        file.write_text(f"{table_of(results, equivalent)}\n\n{line}\n\n{list_of(results, equivalent)}\n")
    return int(killed < 0.95 * counted)


if __name__ == "__main__":
    sys.exit(main())
