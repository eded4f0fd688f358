"""Every block of code in the README and the docs runs; the slow ones are run by the slow tier, and checked here."""

from pathlib import Path

import pytest

from tests.support.blocks import blocks_of, check_commands, comment_before, run_commands, save_checkpoints

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in FILES if "```" in page.read_text()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PAGES_WITH_SLOW_BLOCKS = [page for page in PAGES if "<!-- slow -->" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_quick_blocks_run_and_slow_commands_are_right(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoints(page)
    for example in blocks_of(page).examples():
        said = comment_before(example)
        if not said:
            example.evaluate()
        elif said == "slow" and example.region.evaluator is run_commands:
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
