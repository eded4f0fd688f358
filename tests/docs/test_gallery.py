"""Every picture of the gallery and of the methods' pages says what made it, and lies where its page looks for it."""

import re
from pathlib import Path

import pytest

from scripts import make_gallery, plot_measured

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


METHODS = ("rectified-cfgpp", "cfg-mp", "apg-mix", "mambo-g", "fbg", "nag", "pag", "seg", "stg")
METHODS += ("perpneg", "nasa", "multi")  # that have a picture


def test_a_method_page_shows_what_its_own_command_drew():
    made = make_gallery.pages()
    assert set(made) == {"gallery", *(f"guidance/{name}" for name in METHODS)}
    folders = [words[words.index("--output_dir") + 1] for page in made.values() for words in commands(page)]
    assert len(folders) == len(set(folders)), "pages share a folder of the build"
    for name in METHODS:
        page = made[f"guidance/{name}"]
        ((target, source),) = make_gallery.PICTURE.findall(page.read_text())
        assert f"]({target})" in page.read_text() and (page.parent / target).stat().st_size < 60_000
        assert all(words[words.index("--output_dir") + 1] in source for words in commands(page))
        assert all(any(word.startswith(name) for word in words) for words in list(commands(page))[-1:])


def commands(page):
    return list(make_gallery.commands(make_gallery.drawn(page.read_text())))


@pytest.mark.parametrize("name", plot_measured.PLOTS)
def test_a_plot_shows_the_table_of_today(name):
    drawn = (plot_measured.FOLDER / f"{name}.svg").read_text()
    assert plot_measured.digest(name) in drawn, "the table has changed: run python scripts/plot_measured.py"
    assert f"(images/measured/{name}.svg)" in (ROOT / "docs" / "benchmarks.md").read_text()


def test_intervals_are_read_as_they_stand():
    assert plot_measured.interval("+0.0579 [+0.0426, +0.0740]") == (0.0579, 0.0426, 0.074)
    assert plot_measured.interval("-0.231 [-0.278, -0.182]") == (-0.231, -0.278, -0.182)
    with pytest.raises(ValueError, match="has no table with the columns nothing"):
        plot_measured.table("training.md", "nothing")


def test_the_strip_stands_in_the_readme_and_on_the_first_page():
    assert "(docs/images/strip.png)" in (ROOT / "README.md").read_text()
    assert "(images/strip.png)" in (ROOT / "docs" / "index.md").read_text()


def test_the_settings_that_train_names_are_there():
    from difftune.cli.train import train

    found = {file.stem for file in (ROOT / "difftune" / "examples").glob("*.yaml") if not file.stem.startswith("tiny-")}
    page = (ROOT / "docs" / "guides" / "real-models.md").read_text()
    assert found == set(re.findall(r"\b[a-z0-9]+(?:-[a-z0-9]+)+\b", train.epilog or "")) and len(found) > 5
    assert not [name for name in found if f"`{name}`" not in page]
