"""Mutants: one small change of the code at a time, and whether the tests notice it.

    python scripts/mutate.py --count 64 --seed 0 --table docs/mutants.md

A mutant changes a sign, a factor, an index, a comparison or an end by one. It runs the tests that
`scripts/mutants.json` names for its file, in a copy of the tree and in a process of its own, which ends at the first
failure or at the time limit: then it is killed. One that survives changes nothing that can be seen, and is named with
its reason in `scripts/mutants.json`, or is a missing test: then the exit status is 1, if fewer than 95 % of the others
are killed.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """A change of one expression. `place` is the n-th of its expressions that may change in that file."""

    file: str
    function: str
    kind: str  # "sign", "factor", "index", "off by one"
    line: int
    place: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """What names it in `mutants.json`, wherever its line is."""
        return f"{self.file}::{self.function}: {self.before} -> {self.after}"


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
    found = []
    for place, (function, kind, node, other) in enumerate(changes(ast.parse(source))):
        before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(ast.copy_location(other, node)))
        found.append(Mutant(file, function, kind, node.lineno, place, before, after))
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
    """`count` mutants of the files that have tests, in turn from each prefix of the table."""
    generator, shelves = random.Random(seed), []
    for prefix in sorted(table):
        files = sorted(p for p in ROOT.glob("**/*.py") if _under(p, prefix) and _own(p, prefix, table))
        found = [m for p in files for m in mutants(str(p.relative_to(ROOT)), p.read_text())]
        generator.shuffle(found)
        shelves.append(found)
    turns = [shelf[i] for i in range(max(map(len, shelves), default=0)) for shelf in shelves if i < len(shelf)]
    return turns[:count]


def _under(path: Path, prefix: str) -> bool:
    return str(path.relative_to(ROOT)).startswith(prefix)


def _own(path: Path, prefix: str, table: dict[str, list[str]]) -> bool:
    """Whether no longer prefix takes the file."""
    return not any(other != prefix and other.startswith(prefix) and _under(path, other) for other in table)


def run(tree: Path, tests: list[str], limit: float) -> tuple[str, float]:
    """("killed", "survived" or "timeout", seconds) of the tests in a forked process, which has torch imported."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        _test(tree, tests)
    while time.monotonic() - started < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return ("survived" if status == 0 else "killed"), time.monotonic() - started
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", limit


def _test(tree: Path, tests: list[str]) -> None:
    import pytest

    os.chdir(tree)
    sys.path.insert(0, str(tree))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", "--no-header"]
    os._exit(int(pytest.main([*options, *tests])))


def copied(folder: str) -> Path:
    """The files of the tree that git knows, in a folder."""
    names = subprocess.check_output(["git", "ls-files", *COPIED], cwd=ROOT, text=True).split()
    for name in names:
        if (ROOT / name).is_file():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)
    return Path(folder)


def tried(mutant: Mutant, tree: Path, tests: list[str], limit: float) -> tuple[str, float]:
    """What the tests say of one mutant; the tree is as before afterwards."""
    file = tree / mutant.file
    source = file.read_text()
    try:
        file.write_text(mutated(source, mutant))
        return run(tree, tests, limit)
    finally:
        file.write_text(source)


def table_of(results: list[tuple[Mutant, str, float]], equivalent: dict[str, str]) -> str:
    """The results as a table in Markdown."""
    rows = ["| file | function | kind | change | result |", "|---|---|---|---|---|"]
    for mutant, result, _ in sorted(results, key=lambda r: (r[0].file, r[0].line, r[0].place)):
        change = f"`{mutant.before}` -> `{mutant.after}`".replace("|", "\\|").replace("\n", " ")
        said = f"the same: {equivalent[mutant.key]}" if mutant.key in equivalent and result == "survived" else result
        rows.append(f"| {mutant.file} | {mutant.function} | {mutant.kind} | {change} | {said} |")
    return "\n".join(rows)


def summary(results: list[tuple[Mutant, str, float]], equivalent: dict[str, str]) -> tuple[int, int, list[Mutant]]:
    """(killed, those that change behaviour, survivors that nobody has explained)."""
    same = [m for m, result, _ in results if result == "survived" and m.key in equivalent]
    open_ = [m for m, result, _ in results if result == "survived" and m.key not in equivalent]
    counted = len(results) - len(same)
    return counted - len(open_), counted, open_


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of one mutant's tests")
    parser.add_argument("--only", default="", help="the start of the files' names")
    parser.add_argument("--table", type=Path, help="a Markdown file to write")
    chosen = parser.parse_args(arguments)
    data = json.loads(DATA.read_text())
    equivalent = data["equivalent"]
    import diffusers  # noqa: F401  # imported once, for all children
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copied(folder)
        for mutant in drawn(chosen.count, chosen.seed, data["tests"]):
            if not mutant.file.startswith(chosen.only):
                continue
            result, seconds = tried(mutant, tree, tests_for(mutant.file, data["tests"]), chosen.limit)
            results.append((mutant, result, seconds))
            print(f"{result:8} {seconds:5.1f} s  {mutant.key}", flush=True)
    killed, counted, _ = summary(results, equivalent)
    line = f"{killed} of {counted} mutants that change behaviour were killed; {len(results) - counted} change nothing."
    print(line)
    if chosen.table:
        chosen.table.write_text(f"{table_of(results, equivalent)}\n\n{line}\n")
    return int(killed < 0.95 * counted)


if __name__ == "__main__":
    sys.exit(main())
