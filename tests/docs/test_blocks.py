"""Every block of code in the README and the docs runs; the slow ones are run by the slow tier, and checked here, as are
the commands of those that are not run."""

import re
from pathlib import Path

import click
import pytest

from difftune.errors import UserError
from tests.support.blocks import blocks_of, check_commands, comment_before, run_commands, save_checkpoints

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in FILES if "```" in page.read_text()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PAGES_WITH_SLOW_BLOCKS = [page for page in PAGES if "<!-- slow -->" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_quick_blocks_run_and_all_commands_are_right(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoints(page)
    for example in blocks_of(page).examples():
        said = comment_before(example)
        if not said:
            example.evaluate()
        elif example.region.evaluator is run_commands:  # slow, or not run
            check_commands(example)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES_WITH_SLOW_BLOCKS, ids=str)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoints(page)
    for example in blocks_of(page).examples():
        if not comment_before(example).startswith("not run"):
            example.evaluate()


def test_no_command_stands_where_no_test_looks():
    plain = [block for page in PAGES for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert plain and not [block for block in plain if re.search(r"^(\w+=\S+ )*difftune ", block, re.M)]


@pytest.mark.parametrize(
    "line", ["difftune sample --modle tiny", "accelerate launch -m difftune train alignprop --config nowhere"]
)
def test_a_wrong_flag_is_found_in_a_block_that_is_not_run(tmp_path, line):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n<!-- not run: it takes hours -->\n```bash\npip install .\n{line}\n```\n")
    (example,) = blocks_of(page).examples()
    with pytest.raises((click.UsageError, UserError)):
        check_commands(example)
