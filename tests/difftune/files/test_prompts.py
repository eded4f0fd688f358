"""Training prompts: functions of an index."""

import json
import sys
from collections import Counter

import pytest

from difftune.errors import UserError
from difftune.files.prompts import listed, prompts_named
from rewards.world.draw import held_out
from rewards.world.grammar import CATEGORIES, category, content, parse


def test_shapes_are_parsed_of_every_category_and_not_held_out():
    prompts = prompts_named("shapes", seed=3)
    captions = [parse(prompts(i)) for i in range(600)]
    assert not {content(c) for c in captions} & held_out()
    kinds = Counter(map(category, captions))
    assert kinds.keys() == set(CATEGORIES)
    assert min(kinds.values()) > 50  # of 100 expected


def test_a_prompt_depends_on_seed_and_index_alone():
    forward, backward = prompts_named("shapes", 1), prompts_named("shapes", 1)
    ahead = [forward(i) for i in range(20)]
    assert ahead == [backward(i) for i in reversed(range(20))][::-1]
    assert ahead != [prompts_named("shapes", 2)(i) for i in range(20)]


def test_a_file_is_read_once_per_epoch_in_a_new_order(tmp_path):
    lines = [f"prompt {i}" for i in range(30)]
    (tmp_path / "p.txt").write_text("\n\n".join(lines) + "\n  \n")
    prompts = prompts_named(str(tmp_path / "p.txt"), 0)
    epochs = [[prompts(30 * epoch + i) for i in range(30)] for epoch in range(2)]
    assert all(sorted(epoch) == sorted(lines) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_empty_list_is_one_sentence(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"empty\.txt has no prompt"):
        prompts_named(str(tmp_path / "empty.txt"))
    for name in ("absent.txt", "bytes.txt"):
        with pytest.raises(UserError, match="cannot read the prompts"):
            prompts_named(str(tmp_path / name))
    with pytest.raises(UserError, match="is empty"):
        listed([])


def test_one_category_of_shapes():
    prompts = prompts_named("shapes:counting", 1)
    assert {category(parse(prompts(i))) for i in range(40)} == {"counting"}
    with pytest.raises(UserError, match="did you mean 'counting'"):
        prompts_named("shapes:countin")


def test_animals():
    prompts = prompts_named("animals", 0)
    assert len({prompts(i) for i in range(45)}) == 45


def test_a_column_of_a_data_set_in_a_file_or_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra difftune[datasets]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"id": i, "text": f"prompt {i}", "other": f"o{i}"} for i in range(5)] + [
        {"id": 5, "text": " ", "other": "x"}
    ]
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in (file, file.parent):
        prompts = prompts_named(f"dataset:{name}", 0)
        assert sorted(prompts(i) for i in range(5)) == [f"prompt {i}" for i in range(5)]
    assert prompts_named(f"dataset:{file}:other", 0)(0) in {"o0", "o1", "o2", "o3", "o4", "x"}
    with pytest.raises(UserError, match="has no column 'txt': it has id, text, other"):
        prompts_named(f"dataset:{file}:txt")
    with pytest.raises(UserError, match="cannot load the data set"):
        prompts_named(f"dataset:{tmp_path / 'absent.jsonl'}")


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'difftune\[datasets\]'"):
        prompts_named("dataset:some/where")
