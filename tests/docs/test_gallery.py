"""Every picture of the gallery says what made it, and lies where the page and the README look for it."""

import re
from pathlib import Path

from scripts import make_gallery

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gallery.md").read_text()


def test_every_picture_is_there_and_is_made_by_a_command_of_the_page():
    shown = set(re.findall(r"!\[[^]]+\]\((\S+)\)", PAGE))
    made = dict(make_gallery.PICTURE.findall(PAGE))
    assert shown == {*made, "images/strip.png"} and len(shown) > 5
    assert all((ROOT / "docs" / name).is_file() for name in shown)
    folders = {words[words.index("--output_dir") + 1] for words in make_gallery.commands(PAGE)}
    files = {part for source in made.values() for part in re.findall(r"out/[\w-]+", source)}
    files |= {file.rpartition("/")[0] for _, group in make_gallery.GROUPS for _, file in group}
    assert files == folders


def test_the_strip_stands_in_the_readme_and_on_the_first_page():
    assert "(docs/images/strip.png)" in (ROOT / "README.md").read_text()
    assert "(images/strip.png)" in (ROOT / "docs" / "index.md").read_text()


def test_the_settings_that_train_names_are_there():
    from difftune.cli.train import train

    names = re.findall(r"\b[a-z0-9]+(?:-[a-z0-9]+)+\b", train.epilog or "")
    found = {file.stem for file in (ROOT / "difftune" / "examples").glob("*.yaml")}
    assert len(names) == 3 and set(names) <= found
