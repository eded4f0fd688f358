"""The mutation run: what it changes, what it draws, and that the tests notice a sample of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import mutate

SOURCE = '''\
def f(x, y):
    """a + b"""
    if x < 2 * y[0]:
        raise ValueError(f"{x - y}")
    return -x + y[-1] ** 2


z = 1 + 2
'''


def test_signs_factors_indices_and_ends_are_changed_once_each_and_nothing_else():
    found = mutate.mutants("room/file.py", SOURCE)
    assert {(m.kind, m.before, m.after) for m in found} == {
        ("off by one", "x < 2 * y[0]", "x <= 2 * y[0]"),
        ("factor", "2 * y[0]", "2 / y[0]"),
        ("index", "y[0]", "y[1]"),
        ("sign", "-x + y[-1] ** 2", "-x - y[-1] ** 2"),
        ("sign", "-x", "x"),
        ("factor", "y[-1] ** 2", "y[-1] ** 3"),
        ("index", "y[-1]", "y[0]"),
    }
    for mutant in found:
        changed = mutate.mutated(SOURCE, mutant)
        assert [a == b for a, b in zip(changed.splitlines(), SOURCE.splitlines(), strict=True)].count(False) == 1
        compile(changed, "file.py", "exec")
        assert mutant.room == "room" and mutant.function == "f"


def test_every_file_of_the_four_rooms_has_tests_that_exist():
    table = json.loads(mutate.DATA.read_text())["tests"]
    named = [name for names in table.values() for name in names if name.startswith("tests/")]
    assert not [name for name in named if not (mutate.ROOT / name).exists()]
    assert not [prefix for prefix in table if not any(str(p).startswith(prefix) for p in paths())]
    assert not [str(path) for path in paths() if not mutate.tests_for(str(path), table)]


def paths() -> list[Path]:
    rooms = ("guidance", "solvers", "rewards", "difftune/recipes", "difftune/rollouts", "difftune/reno/regularizers.py")
    found = [
        p for room in rooms for p in ((mutate.ROOT / room).glob("**/*.py") if "." not in room else [mutate.ROOT / room])
    ]
    return [path.relative_to(mutate.ROOT) for path in found]


def test_an_equivalent_mutant_is_one_of_the_code():
    equivalent = json.loads(mutate.DATA.read_text())["equivalent"]
    files = {key.partition("::")[0] for key in equivalent}
    known = {m.key for file in files for m in mutate.mutants(file, (mutate.ROOT / file).read_text())}
    assert not [key for key in equivalent if key not in known]


def test_a_draw_is_the_same_after_changes_elsewhere(monkeypatch, tmp_path):
    for room in ("a", "b"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "one.py").write_text(SOURCE)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    table = {"a/": ["x"], "b/": ["y"]}
    before = mutate.drawn(4, 0, table)
    (tmp_path / "a" / "one.py").write_text("import os\n\n\n" + SOURCE)
    after = mutate.drawn(4, 0, table)
    assert [m.key for m in before] == [m.key for m in after] and [m.room for m in before] == ["a", "b", "a", "b"]
    assert [m.key for m in before] != [m.key for m in mutate.drawn(4, 1, table)]


def test_the_tables_count_what_changes_behaviour():
    one, two, three = mutate.mutants("room/file.py", SOURCE)[:3]
    results = [(one, "killed"), (two, "survived"), (three, "survived")]
    assert mutate.summary(results, {two.key: "no reason"}) == (1, 2, [three])
    assert mutate.table_of(results, {two.key: "no reason"}).splitlines()[-1].endswith("| 1 | 1 | 1 |")
    assert "equivalent: no reason" in mutate.list_of(results, {two.key: "no reason"})


@pytest.mark.slow
def test_a_sample_is_killed(tmp_path):
    """Three mutants, as the command runs them; a second run goes on from its file."""
    command = [sys.executable, "scripts/mutate.py", "--count", "3", "--seed", "5", "--only", "rewards/s"]
    command += ["--results", str(tmp_path / "it.jsonl"), "--table", str(tmp_path / "it.md")]
    for _ in range(2):
        ran = subprocess.run(command, cwd=mutate.ROOT, capture_output=True, text=True)
        assert ran.returncode == 0 and "3 of 3 mutants that change behaviour were killed" in ran.stdout, ran
    assert len((tmp_path / "it.jsonl").read_text().splitlines()) == 3
    assert "| all |" in (tmp_path / "it.md").read_text()


def test_each_sign_that_is_named_stands_once_in_its_file_and_has_tests():
    for change in json.loads(mutate.DATA.read_text())["reversed"]:
        named = mutate.Reversed(**change)
        assert named.changed((mutate.ROOT / named.file).read_text()) and (mutate.ROOT / named.tests[0]).is_file()
    with pytest.raises(ValueError, match="'loss' stands [0-9]+ times in difftune/recipes/nft.py"):
        nft = "difftune/recipes/nft.py"
        mutate.Reversed(nft, "loss", "x", []).changed((mutate.ROOT / nft).read_text())
