"""The file of a person's choices: what it says, and one sentence with the line for what it does not."""

import json

import pytest

from difftune.errors import UserError
from difftune.labelling.choices import decided, read_labels


def line(choice: str = "a", **more) -> dict:
    return {"prompt": "a red circle", "a": "0.png", "b": "1.png", "choice": choice} | more


@pytest.fixture
def write(tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"")

    def write(*lines):
        text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
        (tmp_path / "labels.jsonl").write_text(text)
        return tmp_path / "labels.jsonl"

    return write


def test_choices_are_read_in_order_with_paths_of_the_files_folder(write, tmp_path):
    file = write(line("b", seed_a=3, seed_b=4, model="tiny", time="2026-01-01T00:00:00"), line("tie"), line("skip"))
    first, tie, skip = read_labels(file)
    assert (first.winner, first.loser) == (tmp_path / "1.png", tmp_path / "0.png")
    assert (first.seed_a, first.seed_b, first.model, first.line) == (3, 4, "tiny", 0)
    assert (tie.choice, tie.seed_a, skip.choice, skip.line) == ("tie", None, "skip", 2)
    assert decided(file) == [first]


def test_an_undone_choice_is_gone_and_can_be_made_again(write):
    file = write(line("a"), line("b"), {"undo": 0}, line("b"), {"undo": 1})
    assert [(choice.line, choice.choice) for choice in read_labels(file)] == [(3, "b")]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("{torn", "line 1 is no JSON"),
        ("[1]", "line 1 is '\\[1\\]', not an object"),
        (line("c"), "line 1: choice is 'c', not one of a, b, tie, skip"),
        ({"prompt": "x", "a": "0.png", "choice": "a"}, "line 1: b is None, not a text"),
        (line(seed_a="three"), "line 1: seed_a is 'three', not a whole number or null"),
        (line(seed_b=True), "line 1: seed_b is True, not a whole number or null"),
        (line(a="2.png"), "line 1: there is no picture .*2.png"),
        ({"undo": 1}, "line 1 takes back line 1, which holds no choice"),
        ({"undo": "0"}, "line 1 takes back line '0'"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_line(write, wrong, what):
    with pytest.raises(ValueError, match=what) as error:
        read_labels(write(line(), wrong, line()))
    assert "\n" not in str(error.value)


def test_a_choice_is_taken_back_once(write):
    with pytest.raises(UserError, match="line 2 takes back line 0"):
        read_labels(write(line(), {"undo": 0}, {"undo": 0}))


def test_no_choice_and_no_file_are_said(write, tmp_path):
    with pytest.raises(UserError, match="holds no choice between two pictures"):
        decided(write(line("tie"), line("skip")))
    with pytest.raises(UserError, match="cannot read the labels"):
        read_labels(tmp_path / "none.jsonl")
