"""What a person may type: each wrong command ends in one sentence, before any work, and leaves nothing behind."""

import shutil

import pytest
from click.testing import CliRunner
from diffusers import UNet2DConditionModel

from difftune.cli.program import cli
from tests.support.fuzz import Case, Fuzzer


class Begun(Exception):
    """Work was begun."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def fuzzer(root):
    """Made, with its runs, before networks must not be called."""
    made = Fuzzer(root / "a", 0)
    made.make_runs()
    return made


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch, root):
    """A network that is called says that work was begun before the refusal."""

    def begun(*arguments, **options):
        raise Begun("the network was called")

    monkeypatch.setattr(UNet2DConditionModel, "forward", begun)
    work = root / "work"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)


def fault(case: Case, work) -> str:
    """What is wrong with the end of a command; "" where it is as it should be."""
    done = CliRunner().invoke(cli, [str(work / "out") if word == "OUT" else word for word in case.words])
    if case.may_run and (isinstance(done.exception, Begun) or done.exit_code == 0):
        return ""
    left = sorted(path.name for path in work.iterdir())
    for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not isinstance(done.exception, SystemExit):
        return f"{case}: {type(done.exception).__name__} {str(done.exception)[:200]}"
    if done.exit_code not in (1, 2) or done.stdout:
        return f"{case}: exit {done.exit_code}, stdout {done.stdout[:100]!r}"
    if not (done.stderr.splitlines() or [""])[-1].startswith("difftune: "):
        return f"{case}: {done.stderr[-200:]!r}"
    return f"{case}: left {left}" if left else ""


def faults(fuzzer: Fuzzer, count: int, work) -> list[str]:
    return [found for case in fuzzer.cases(count) if (found := fault(case, work))]


def test_wrong_commands_end_in_a_sentence(fuzzer, root):
    found = faults(fuzzer, 270, root / "work")
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_more_wrong_commands_end_in_a_sentence(fuzzer, root):
    fuzzer.draw.seed(1)
    found = faults(fuzzer, 1545, root / "work")
    assert not found, "\n".join(found)
