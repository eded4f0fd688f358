"""Labels by a person: what is read and shown, the file that no crash spoils, the server, and a real browser."""

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from PIL import Image

from difftune.cli.program import cli
from difftune.errors import RunError, UserError
from difftune.labelling import server as label_server
from difftune.labelling.choices import read_labels
from difftune.labelling.label_file import LabelFile, live
from difftune.labelling.server import open_server
from difftune.labelling.session import Session
from difftune.labelling.tasks import draw_tasks, pictures_to_label

RED, BLUE = "a red circle", "a blue square"


def drawn(folder, names, size=8):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (size, size), (40 * i % 256, 90, 200)).save(folder / name)


def sampled(folder, prompts=(RED, BLUE), count=2, model="tiny"):
    """A folder as `difftune sample` writes it."""
    jobs = [(p, 7 + i) for p in prompts for i in range(count)]
    images = [{"file": f"{i:05d}-seed{s}.png", "prompt": p, "seed": s, "nfe": 4} for i, (p, s) in enumerate(jobs)]
    drawn(folder, [i["file"] for i in images])
    (folder / "sample.json").write_text(json.dumps({"settings": {"model": model}, "images": images}))
    return folder


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the pictures


def test_a_folder_of_sample_is_read_with_seeds_and_model(tmp_path):
    found = pictures_to_label(sampled(tmp_path))
    assert [(p.prompt, p.seed, p.model, p.mime) for p in found] == [
        (prompt, seed, "tiny", "image/png") for prompt in (RED, BLUE) for seed in (7, 8)
    ]
    assert [p.file.name for p in found][:2] == ["00000-seed7.png", "00001-seed8.png"]


def test_what_the_sample_command_writes_is_read(tmp_path):
    from tests.support.pipelines import sd

    sd().save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--prompt", RED, BLUE, "--num_images", 2, "--seed", 5, "--steps", 1]
    result = CliRunner().invoke(cli, [str(a) for a in ["sample", *flags, "--output_dir", tmp_path / "out"]])
    assert result.exit_code == 0, result.stderr
    found = pictures_to_label(tmp_path / "out")
    assert [(p.prompt, p.seed, p.model) for p in found] == [
        (prompt, seed, str(tmp_path / "model")) for prompt in (RED, BLUE) for seed in (5, 6)
    ]


def test_folders_of_several_samples_are_read_together(tmp_path):
    sampled(tmp_path / "base", [RED], 1, "tiny")
    sampled(tmp_path / "tuned", [RED], 1, "other")
    (task,) = draw_tasks(pictures_to_label(tmp_path))
    assert {p.model for p in task} == {"tiny", "other"}


PLAIN = [{"file": "a.png", "prompt": RED}, {"file": "b.jpg", "prompt": RED, "seed": 3, "model": "m"}]
TABLES = {
    "prompts.json": json.dumps(PLAIN),
    "prompts.jsonl": "\n".join(map(json.dumps, PLAIN)) + "\n\n",
    "prompts.csv": f"file,prompt,seed,model\na.png,{RED},,\nb.jpg,{RED},3,m\n",
    "metadata.jsonl": "\n".join(json.dumps({"file_name": i["file"], "text": i["prompt"]} | i) for i in PLAIN),
    "metadata.csv": f"file_name,text,seed,model\na.png,{RED},,\nb.jpg,{RED},3,m\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("given", [False, True])
def test_a_table_tells_the_prompts(name, given, tmp_path):
    drawn(tmp_path / "images", ["a.png", "b.jpg"])
    table = tmp_path / "elsewhere.x" if given else tmp_path / "images" / name
    table = table.with_suffix(os.path.splitext(name)[1])
    table.write_text(TABLES[name])
    found = pictures_to_label(tmp_path / "images", table if given else None)
    assert [(p.file.name, p.prompt, p.seed, p.model, p.mime) for p in found] == [
        ("a.png", RED, None, None, "image/png"),
        ("b.jpg", RED, 3, "m", "image/jpeg"),
    ]


def test_a_mapping_from_file_to_prompt_is_a_table(tmp_path):
    drawn(tmp_path, ["a.png", "b.png"])
    (tmp_path / "prompts.json").write_text(json.dumps({"a.png": RED, "b.png": BLUE}))
    assert [(p.file.name, p.prompt) for p in pictures_to_label(tmp_path)] == [("a.png", RED), ("b.png", BLUE)]


@pytest.mark.parametrize(
    ("name", "table", "saying"),
    [
        ("prompts.json", "{", "cannot read the prompts"),
        ("prompts.json", "[" * 100_000, "cannot read the prompts"),
        ("prompts.json", "[]", "lists no pictures"),
        ("prompts.json", '["a.png"]', "lists no pictures"),
        ("prompts.json", "3", "lists no pictures"),
        ("prompts.json", '{"a.png": " "}', "lacks a file or a prompt"),
        ("prompts.json", '{"a.png": ["x"]}', "lacks a file or a prompt"),
        ("prompts.json", '[{"prompt": "x"}]', "entry 0"),
        ("prompts.json", '{"../secret.png": "x"}', "lies outside"),
        ("prompts.json", '{"/etc/passwd": "x"}', "lies outside"),
        ("prompts.json", '{"absent.png": "x"}', "absent.png"),
        ("prompts.json", '{"prompts.json": "x"}', "not a picture that a browser shows"),
        ("prompts.json", '[{"file": "a.png", "prompt": "x", "seed": "y"}]', "'y' is not a whole number"),
        ("prompts.jsonl", '{"file": "a.png", "prompt": "x"}\n' * 2, "listed twice"),
        ("prompts.jsonl", '{"file"', "cannot read the prompts"),
        ("prompts.csv", "name\nx\n", "lacks a file or a prompt"),
    ],
)
def test_a_table_that_is_wrong_is_one_sentence(name, table, saying, tmp_path):
    drawn(tmp_path, ["secret.png"])
    drawn(tmp_path / "images", ["a.png"])
    (tmp_path / "images" / name).write_text(table)
    with pytest.raises(UserError, match=saying) as error:
        pictures_to_label(tmp_path / "images")
    assert "\n" not in str(error.value)


def test_a_folder_without_pictures_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        pictures_to_label(tmp_path / "absent")
    with pytest.raises(UserError, match="say with --prompts"):
        pictures_to_label(tmp_path)
    with pytest.raises(UserError, match="it is no .json"):
        (tmp_path / "p.txt").write_text("x")
        pictures_to_label(tmp_path, tmp_path / "p.txt")
    with pytest.raises(UserError, match="no prompt has two pictures"):
        draw_tasks(pictures_to_label(sampled(tmp_path / "one", count=1)))


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_round_shows_each_picture_and_a_task_one_prompt(count, size, tmp_path):
    found = pictures_to_label(sampled(tmp_path, count=count))
    todo = draw_tasks(found, size)
    assert {p for task in todo for p in task} == set(found)
    for task in todo:
        assert len(set(task)) == len(task) == min(size, count)
        assert len({p.prompt for p in task}) == 1
    assert len(todo) == 2 * -(-count // size)
    assert todo == draw_tasks(found, size) != draw_tasks(found, size, seed=1)


def test_rounds_bring_new_pairs_and_none_twice(tmp_path):
    found = pictures_to_label(sampled(tmp_path, [RED], 4))
    pairs = [frozenset(task) for task in draw_tasks(found, 2, rounds=40)]
    assert len(pairs) == len(set(pairs)) == 6  # all of 4 pictures


def test_left_and_right_are_drawn(tmp_path):
    found = pictures_to_label(sampled(tmp_path, [f"prompt {i}" for i in range(100)]))
    lefts = sum(task[0].seed == 7 for task in draw_tasks(found))
    assert 30 < lefts < 70  # 4 standard deviations


# ------------------------------------------------------------------------------------------------ the label file


def session(folder, size=2, rounds=1):
    return Session(draw_tasks(pictures_to_label(folder), size, rounds), LabelFile.open(folder / "labels.jsonl"))


def test_a_choice_of_two_is_the_agreed_line(tmp_path):
    s = session(sampled(tmp_path, [RED]))
    ((a, b),) = s.todo
    for choice, word in [(0, "a"), (1, "b"), ("tie", "tie"), ("skip", "skip")]:
        s.choose(0, choice)
        line = written(tmp_path / "labels.jsonl")[-1]
        assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
        assert line == {
            "prompt": RED, "a": a.file.name, "b": b.file.name, "choice": word,
            "seed_a": a.seed, "seed_b": b.seed, "model": "tiny",
        }  # fmt: skip
    assert s.labels.lines == written(tmp_path / "labels.jsonl")


def test_paths_are_relative_to_the_label_file_and_a_model_of_both_alone_is_named(tmp_path):
    sampled(tmp_path / "x" / "base", [RED], 1, "tiny")
    sampled(tmp_path / "x" / "tuned", [RED], 1, "other")
    s = Session(draw_tasks(pictures_to_label(tmp_path / "x")), LabelFile.open(tmp_path / "y" / "labels.jsonl"))
    s.choose(0, 0)
    (line,) = written(tmp_path / "y" / "labels.jsonl")
    assert {line["a"], line["b"]} == {"../x/base/00000-seed7.png", "../x/tuned/00000-seed7.png"}
    assert line["model"] is None
    assert s.done() == [True]


@pytest.mark.parametrize("choice", [0, 1, 2, 3, "tie", "bad", "skip"])
def test_a_choice_of_four_is_the_best_against_each_other(choice, tmp_path):
    s = session(sampled(tmp_path, [RED], 4), size=4)
    s.choose(0, choice)
    (task,), lines = s.todo, written(tmp_path / "labels.jsonl")
    assert [line["of"] for line in lines] == [3, 3, 3] and len({line["time"] for line in lines}) == 1
    if isinstance(choice, str):
        assert [line["choice"] for line in lines] == [choice] * 3
    else:
        won = [(line["a"], line["b"]) if line["choice"] == "a" else (line["b"], line["a"]) for line in lines]
        assert {winner for winner, _ in won} == {task[choice].file.name}
        assert {loser for _, loser in won} == {p.file.name for p in task} - {task[choice].file.name}
    assert s.state == ["skipped" if choice == "skip" else "done"]
    s.undo()
    assert s.done() == [False] and live(s.labels.lines) == {}


def test_what_was_skipped_comes_back_after_all_others_and_skipped_again_it_does_not(tmp_path):
    s = session(sampled(tmp_path, [RED, BLUE, "a dog"]))
    assert s.next(9) == [0, 1, 2]
    s.choose(0, "skip")
    assert s.next(9) == [1, 2, 0]
    s.choose(1, 0)
    s.choose(2, "bad")
    assert (s.next(), s.done()) == ([0], [False, True, True])
    s.choose(0, "skip")
    assert s.next() == []
    s.undo()
    assert s.next() == [0]
    s.choose(0, 1)
    assert s.next() == [] and s.done() == [True] * 3
    s.labels.close()
    again = session(tmp_path)
    assert again.state == s.state and again.holding == s.holding


def test_a_session_is_what_its_lines_say_however_it_came_about(tmp_path):
    """What is kept as choices are made is what a new start reads from the file."""
    s, rng = session(sampled(tmp_path, [RED, BLUE], 5), size=3, rounds=2), random.Random(1)
    for _ in range(60):
        waiting = s.next(9)
        if waiting and rng.random() < 0.7:
            s.choose(rng.choice(waiting), rng.choice([0, 1, 2, "tie", "bad", "skip"]))
        else:
            s.undo()
        again = Session(s.todo, s.labels)
        assert (again.state, again.counts, again.holding) == (s.state, +s.counts, s.holding)
        assert s.holding == live(s.labels.lines)


def cost_of_a_choice(prompts, folder):
    """CPU seconds of a choice and of what is asked next, the least of twenty: others have waited for something else."""
    sampled(folder, [f"prompt {i}" for i in range(prompts)])
    s, found = session(folder), []
    for task in range(20):
        began = time.thread_time()
        s.choose(task, 0)
        s.next(3)
        found.append(time.thread_time() - began)
    return min(found)


def test_a_choice_costs_the_same_whatever_the_number_of_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    few, many = (cost_of_a_choice(n, tmp_path / str(n)) for n in (20, 1000))
    assert many < 0.025 and many < 10 * few, (few, many)


def test_undo_takes_back_the_last_choice_that_holds_and_then_the_one_before(tmp_path):
    s = session(sampled(tmp_path, [RED, BLUE, "a dog"]))
    for task, choice in enumerate([0, 1, "tie"]):
        s.choose(task, choice)
    s.undo()
    s.undo()
    assert written(tmp_path / "labels.jsonl")[3:] == [{"undo": 2}, {"undo": 1}]
    assert s.done() == [True, False, False]
    s.choose(1, "skip")
    s.undo()
    s.undo()
    s.undo()  # nothing remains
    assert written(tmp_path / "labels.jsonl")[6:] == [{"undo": 5}, {"undo": 0}]


def test_what_is_written_is_what_a_recipe_reads(tmp_path):
    prompts = ["a line\u2028within", "ein grüner Kreis", *map(str, range(8))]
    s, rng = session(sampled(tmp_path, prompts, 3), size=3), random.Random(0)
    for _ in range(40):
        waiting = [i for i, done in enumerate(s.done()) if not done]
        if waiting and rng.random() < 0.7:
            s.choose(waiting[0], rng.choice([0, 1, 2, "tie", "skip"]))
        else:
            s.undo()
    read = {c.line: (c.prompt, c.choice, c.seed_a, c.seed_b, c.model) for c in read_labels(tmp_path / "labels.jsonl")}
    holding = live(s.labels.lines).items()
    assert len(read) >= 6
    assert read == {i: tuple(x[k] for k in ("prompt", "choice", "seed_a", "seed_b", "model")) for i, x in holding}


@pytest.mark.parametrize("ending", [b"", b'{"undo": 1}\n'])
def test_a_file_cut_anywhere_opens_with_its_whole_lines_and_loses_no_byte(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 600 waits for the disk
    s = session(sampled(tmp_path, [RED, "ein grüner Kreis"]))
    s.choose(0, 0)
    s.choose(1, "tie")
    s.labels.close()
    path = tmp_path / "labels.jsonl"
    data = path.read_bytes() + ending
    torn = path.with_name("labels.jsonl.torn")
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        labels = LabelFile.open(path)
        labels.append([{"undo": 0}])
        labels.close()
        whole = data[:cut].count(b"\n") + (data[cut : cut + 1] == b"\n")
        after = path.read_bytes()
        assert after == b"".join(data.splitlines(True)[:whole]) + b'{"undo": 0}\n'
        kept = torn.read_bytes() if torn.exists() else b""
        assert data[:cut].rstrip(b"\n") == (after.removesuffix(b'{"undo": 0}\n') + kept).rstrip(b"\n")
        torn.unlink(missing_ok=True)


def test_a_choice_of_four_cut_anywhere_holds_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    s = session(sampled(tmp_path, [RED], 4), size=4)
    s.choose(0, 2)
    s.undo()
    s.choose(0, 1)
    s.undo()
    s.labels.close()
    data = (tmp_path / "labels.jsonl").read_bytes()
    seen = set()
    for cut in range(0, len(data) + 1, 7):
        (tmp_path / "labels.jsonl").write_bytes(data[:cut])
        again = session(tmp_path, size=4)
        seen.add(len(live(again.labels.lines)))
        again.labels.close()
    assert seen == {0, 3}


def test_a_file_is_written_by_one_process(tmp_path):
    first = LabelFile.open(tmp_path / "labels.jsonl")
    with pytest.raises(UserError, match=f"written by another `difftune label`, process {os.getpid()}: end that"):
        LabelFile.open(tmp_path / "labels.jsonl")
    first.close()
    LabelFile.open(tmp_path / "labels.jsonl").close()


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"a": "x"}'])
def test_a_line_that_is_no_label_is_named_and_nothing_is_changed(line, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"undo": 9}\n' + line + '\n{"torn')
    with pytest.raises(UserError, match="line 1 of"):
        LabelFile.open(path)
    path.write_text("")
    LabelFile.open(path).close()  # the lock was given back


WRONG = {
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "a picture of one line": b"\xff\xd8\xff\xe0JFIF",
    "notes": b"buy milk\nand bread",
    "a line of notes": b"buy milk",
    "another JSON": b'{"name": "x"}\n',
    "another JSON without an end": b'{"name": "x"}',
    "an undo of a word": b'{"undo": "x"}\n',
    "a number": b"7",
    "nul": b"\x00\x00",
    "a label, then a picture": b'{"undo": 1}\n\x89PNG',
    "deep JSON": b"[" * 100_000 + b"\n",
    "lines of another tool, cut": b'{"prompt": "a", "completion": "b", "cho',
    "one line of another tool, cut": b'{"prompt": "a \\"b\\"", "image": "c.png',
    "paths that are numbers": b'{"a": 1, "b": 2, "choice": "a"}\n',
}


@pytest.mark.parametrize("what", WRONG)
def test_another_file_is_refused_and_not_touched(what, tmp_path):
    path = tmp_path / "mine"
    path.write_bytes(WRONG[what])
    before = path.stat()
    with pytest.raises(UserError, match=r"--labels") as error:
        LabelFile.open(path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == WRONG[what] and path.stat().st_mtime_ns == before.st_mtime_ns
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null"), Path("/dev/full")):
        with pytest.raises(UserError, match="cannot write labels to"):
            LabelFile.open(path)


@pytest.mark.parametrize("failing", ["short", "error"])
def test_a_label_that_cannot_be_written_leaves_the_file_as_it_was(failing, tmp_path, monkeypatch):
    s = session(sampled(tmp_path))
    s.choose(0, 0)
    before, write = (tmp_path / "labels.jsonl").read_bytes(), os.write

    def half(descriptor, data):
        count = write(descriptor, data[: len(data) // 2])
        if failing == "error":
            raise OSError(28, "No space left on device")
        return count

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(RunError, match="was not written"):
        s.choose(1, 0)
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    monkeypatch.undo()
    s.choose(1, 1)
    assert s.done() == [True, True]


# ------------------------------------------------------------------------------------------------ the server


@contextmanager
def serving(folder, **options):
    with open_server(folder, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.session.labels.close()


@pytest.fixture
def server(tmp_path):
    with serving(sampled(tmp_path, [RED, BLUE, "a dog"])) as server:
        yield server


def ask(url, place="", body=None, method=None, **headers):
    """(status, body, headers) of a request, with headers as they are given."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    given = {"Content-Type": "application/json"} if body is not None else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    path = place if place.startswith("//") else parts.path + place
    connection.request(method or ("GET" if body is None else "POST"), path, data, given)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def state(url):
    return json.loads(ask(url, "state")[1])


def test_the_page_is_whole_and_may_load_nothing_from_elsewhere(server):
    status, body, headers = ask(server.url)
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert b"http" not in body and b"src=" not in body and b"nonce=" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server.url.rstrip("/"))[0] == 200


def test_labels_are_written_one_by_one_and_the_next_task_follows(server, tmp_path):
    for done, choice in enumerate([0, 1, "tie"]):
        now = state(server.url)
        assert (now["done"], now["total"], now["can_undo"]) == (done, 3, done > 0)
        for source, picture in zip(now["task"]["images"], server.session.todo[now["task"]["id"]], strict=True):
            status, body, headers = ask(server.url, source)
            assert (status, headers["Content-Type"]) == (200, "image/png") and body == picture.file.read_bytes()
        status, _, _ = ask(server.url, "label", {"task": now["task"]["id"], "choice": choice})
        assert status == 200
        assert written(tmp_path / "labels.jsonl")[-1]["prompt"] == now["task"]["prompt"]
    assert [line["choice"] for line in written(tmp_path / "labels.jsonl")] == ["a", "b", "tie"]
    assert state(server.url) == {"task": None, "done": 3, "total": 3, "can_undo": True}


def test_a_restart_goes_on_and_undo_reaches_back(tmp_path):
    folder = sampled(tmp_path, [RED, BLUE, "a dog"])
    with serving(folder) as server:
        ask(server.url, "label", {"task": 0, "choice": 0})
        second = state(server.url)["task"]
    with serving(folder) as server:
        assert state(server.url)["task"] == second
        again = json.loads(ask(server.url, "undo", {})[1])
        assert (again["done"], again["can_undo"], again["task"]["id"]) == (0, False, 0)
    assert written(tmp_path / "labels.jsonl")[1:] == [{"undo": 0}]


def test_a_second_click_on_the_same_task_writes_nothing(server, tmp_path):
    assert ask(server.url, "label", {"task": 0, "choice": 0})[0] == 200
    assert ask(server.url, "label", {"task": 0, "choice": 1})[0] == 409
    assert len(written(tmp_path / "labels.jsonl")) == 1


REFUSED = {
    "another token": (404, {"place": "//wrong/state"}),
    "no token": (404, {"place": "//"}),
    "an unknown place": (404, {"place": "nothing"}),
    "a path out": (404, {"place": "image/../../../../etc/passwd"}),
    "a coded path out": (404, {"place": "image/%2e%2e%2f%2e%2e%2fetc%2fpasswd"}),
    "a picture too many": (404, {"place": "image/6"}),
    "a negative picture": (404, {"place": "image/-1"}),
    "a long number": (404, {"place": "image/" + "9" * 5000}),
    "another host": (403, {"place": "state", "Host": "evil.example"}),
    "a host that begins alike": (403, {"place": "state", "Host": "localhost.evil.example:80"}),
    "half a host": (403, {"place": "state", "Host": "[::1"}),
    "another origin": (403, {"place": "label", "body": {"task": 0, "choice": 0}, "Origin": "http://evil.example"}),
    "no origin": (403, {"place": "undo", "body": {}, "Origin": "null"}),
    "a form": (415, {"place": "label", "body": b"task=0", "Content_Type": "text/plain"}),
    "a post to the page": (404, {"place": "", "body": {}}),
    "no JSON": (400, {"place": "label", "body": b"{"}),
    "no object": (400, {"place": "label", "body": [1]}),
    "deep JSON": (400, {"place": "label", "body": b"[" * 4000}),
    "no task": (400, {"place": "label", "body": {"choice": 0}}),
    "another task": (400, {"place": "label", "body": {"task": 3, "choice": 0}}),
    "a task that is true": (400, {"place": "label", "body": {"task": True, "choice": 0}}),
    "another picture": (400, {"place": "label", "body": {"task": 0, "choice": 2}}),
    "a negative choice": (400, {"place": "label", "body": {"task": 0, "choice": -1}}),
    "a choice that is true": (400, {"place": "label", "body": {"task": 0, "choice": True}}),
    "another word": (400, {"place": "label", "body": {"task": 0, "choice": "best"}}),
    "a list as a choice": (400, {"place": "label", "body": {"task": 0, "choice": []}}),
    "a long body": (413, {"place": "label", "body": b" " * 100_000}),
    "a length that is not a number": (411, {"place": "label", "body": b"", "Content_Length": "many"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_request_of_the_page_is_refused_and_writes_nothing(case, server, tmp_path):
    status, asked = REFUSED[case]
    found, body, _ = ask(server.url, **asked)
    assert found == status and json.loads(body)["error"]
    assert (tmp_path / "labels.jsonl").read_bytes() == b""


def test_a_label_that_was_not_written_is_said(server, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("gone")))
    status, body, _ = ask(server.url, "label", {"task": 0, "choice": 0})
    assert status == 500 and "was not written" in json.loads(body)["error"]


# ------------------------------------------------------------------------------------------------ the command


def started(folder, *flags):
    command = [sys.executable, "-m", "difftune", "label", "--images", str(folder), "--port", "0", "--json", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, json.loads(process.stdout.readline())


def test_a_killed_labeller_loses_nothing_and_ctrl_c_ends_one(tmp_path):
    process, said = started(sampled(tmp_path, [RED, BLUE, "a dog"]))
    assert said["labels"] == str(tmp_path / "labels.jsonl")
    for task in (0, 1):
        ask(said["url"], "label", {"task": task, "choice": 0})
    process.kill()
    process.communicate()
    process, said = started(tmp_path)
    assert state(said["url"])["done"] == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors.strip()) == (130, "difftune: interrupted")


def test_the_command_ends_in_one_sentence(tmp_path):
    for arguments, code, words in [
        (["--images", str(tmp_path / "absent")], 2, "is not a folder"),
        (["--images", str(sampled(tmp_path / "x")), "--grid", "1"], 2, "--grid"),
        (["--images", str(tmp_path / "x"), "--labels", str(tmp_path)], 2, "cannot write labels"),
        ([], 2, "--images"),
    ]:
        result = CliRunner().invoke(cli, ["label", *arguments])
        assert result.exit_code == code and words in result.stderr and result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_taken_port_is_one_sentence_and_the_label_file_is_free_again(server, tmp_path):
    port = server.server_address[1]
    with pytest.raises(RunError, match="cannot listen"):
        open_server(sampled(tmp_path / "other"), port=port)
    assert not (tmp_path / "other" / "labels.jsonl").exists()
    LabelFile.open(tmp_path / "other" / "labels.jsonl").close()


# ------------------------------------------------------------------------------------------------ a real browser


@contextmanager
def opened(browser, url):
    """A page, all requests of which were answered from here, and which reported no error."""
    page = browser.new_page()
    errors, hosts = [], set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(url)
    yield page
    page.close()
    assert errors == [] and hosts - {""} == {urlsplit(url).netloc}


def labelled(page, count, total):
    page.get_by_text(f"{count} of {total} labelled", exact=True).wait_for(timeout=60_000)


def wait_for_pictures(page):
    page.locator("#pictures:not(.loading) img").first.wait_for(timeout=60_000)


def pressed(page, key):
    wait_for_pictures(page)
    page.keyboard.press(key)


@pytest.mark.browser
def test_a_person_labels_pairs_by_mouse_and_keys(browser, tmp_path):
    folder = sampled(tmp_path, [f"prompt <{i}>" for i in range(6)])
    path = folder / "labels.jsonl"
    with serving(folder) as server, opened(browser, server.url) as page:
        labelled(page, 0, 6)
        page.get_by_role("heading", name=server.session.todo[0][0].prompt).wait_for()
        assert page.get_by_role("button", name="Undo").is_disabled()
        alts = [image.get_attribute("alt") for image in page.get_by_role("img").all()]
        prompt = server.session.todo[0][0].prompt
        assert alts == [f"{side}, for the prompt: {prompt}" for side in ("Left", "Right")]
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth === 8)")
        wait_for_pictures(page)
        page.get_by_role("button", name="Right").click()
        labelled(page, 1, 6)
        pressed(page, "ArrowLeft")
        labelled(page, 2, 6)
        pressed(page, "ArrowRight")
        labelled(page, 3, 6)
        pressed(page, "T")
        labelled(page, 4, 6)
        pressed(page, "u")
        labelled(page, 3, 6)
        wait_for_pictures(page)
        page.get_by_role("button", name="Tie").click()
        labelled(page, 4, 6)
        wait_for_pictures(page)
        page.get_by_role("button", name="Skip").click()
        page.get_by_text("4 of 6 labelled, 1 skipped", exact=True).wait_for(timeout=60_000)
        wait_for_pictures(page)
        page.get_by_role("button", name="Undo").click()
        labelled(page, 4, 6)
    words = [line.get("choice", line.get("undo")) for line in written(path)]
    assert words == ["b", "a", "b", "tie", 3, "tie", "skip", 6]
    assert [line["prompt"] for line in written(path)[:3]] == [task[0].prompt for task in server.session.todo[:3]]
    with serving(folder) as server, opened(browser, server.url) as page:  # a restart goes on
        labelled(page, 4, 6)
        pressed(page, "s")
        page.get_by_text("4 of 6 labelled, 1 skipped", exact=True).wait_for(timeout=60_000)
        wait_for_pictures(page)
        page.keyboard.press("Tab")  # from the prompt to the left picture, which Enter chooses
        page.keyboard.press("Enter")
        page.get_by_text("5 of 6 labelled, 1 skipped", exact=True).wait_for(timeout=60_000)
        pressed(page, "b")  # the one that was skipped is back
        page.get_by_role("heading", name="All are labelled").wait_for()
        assert page.get_by_role("img").count() == 0 and page.get_by_role("button", name="Undo").is_enabled()
    assert [line.get("choice") for line in written(path)[8:]] == ["skip", "a", "bad"]


@pytest.mark.browser
def test_a_person_picks_the_best_of_four_by_number(browser, tmp_path):
    folder = sampled(tmp_path, [RED], 4)
    with serving(folder, grid=4) as server, opened(browser, server.url) as page:
        labelled(page, 0, 1)
        assert page.get_by_role("img").count() == 4
        pressed(page, "5")  # no picture
        page.keyboard.press("3")
        labelled(page, 1, 1)
        best = server.session.todo[0][2].file.name
    assert {line["a"] if line["choice"] == "a" else line["b"] for line in written(folder / "labels.jsonl")} == {best}


@pytest.mark.browser
def test_a_page_says_when_the_labeller_has_ended(browser, tmp_path):
    page = browser.new_page()
    with serving(sampled(tmp_path)) as server:
        page.goto(server.url)
        labelled(page, 0, 2)
        wait_for_pictures(page)
    page.keyboard.press("ArrowLeft")
    page.get_by_role("alert").get_by_text("does not answer").wait_for(timeout=60_000)
    page.close()
    assert (tmp_path / "labels.jsonl").read_bytes() == b""


@pytest.mark.browser
def test_keys_count_once_both_pictures_are_seen_and_each_is_told(browser, tmp_path, monkeypatch):
    """A person who presses a key again and again, and pictures that come late: no pair is labelled unseen, and no key
    is dropped in silence."""
    folder, there = sampled(tmp_path, [f"prompt {i}" for i in range(8)]), threading.Event()
    image = label_server._image
    monkeypatch.setattr(label_server, "_image", lambda picture: (there.wait(60), image(picture))[1])
    with serving(folder) as server, opened(browser, server.url) as page:
        labelled(page, 0, 8)
        page.evaluate(WATCH)
        for early in range(1, 6):
            page.keyboard.press("ArrowLeft")
            page.wait_for_function("early => window.early === early", arg=early)
        assert written(folder / "labels.jsonl") == []
        there.set()
        while not page.get_by_role("heading", name="All are labelled").is_visible():
            page.keyboard.press("ArrowLeft")
        counted, unseen = page.evaluate("[counted, unseen]")
    assert [line["choice"] for line in written(folder / "labels.jsonl")] == ["a"] * 8
    assert unseen == 0 and counted == 8


WATCH = """() => {
  window.counted = window.early = window.unseen = 0;
  const fetched = window.fetch;
  window.fetch = (place, about) => {
    if (about) unseen += [...document.querySelectorAll('#pictures img')].some(i => !i.complete || !i.naturalWidth);
    return fetched(place, about);
  };
  new MutationObserver(() => {
    const text = document.getElementById('said').textContent;
    if (text.startsWith('Too early')) early += 1; else counted += 1;
  }).observe(document.getElementById('said'), {childList: true});
}"""


@pytest.mark.browser
def test_the_next_pictures_are_loaded_ahead_and_none_twice(browser, tmp_path):
    folder = sampled(tmp_path, [f"prompt {i}" for i in range(5)])
    with serving(folder) as server:
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url) if "/image/" in request.url else None)
        page.goto(server.url)
        labelled(page, 0, 5)
        asked_for(page, asked, 6)  # the pair that is shown and the two that come
        pressed(page, "1")
        labelled(page, 1, 5)
        pressed(page, "2")
        labelled(page, 2, 5)
        asked_for(page, asked, 10)
        assert len(set(asked)) == 10
        page.close()


def asked_for(page, asked, count):
    """Waits until so many pictures were asked for, and a little longer for one too many."""
    deadline = time.monotonic() + 10
    while len(asked) < count and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    page.wait_for_timeout(200)
    assert len(asked) == count


@pytest.mark.browser
def test_a_picture_is_seen_in_its_own_pixels_and_turned(browser, tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (1200, 900), (90, 40, 200)).save(folder / f"{name}.png")
    (folder / "prompts.json").write_text(json.dumps({"a.png": RED, "b.png": RED}))
    with serving(folder) as server, opened(browser, server.url) as page:
        pressed(page, "z")
        page.get_by_text("Left, 1200 × 900").wait_for()
        assert page.locator("dialog img").evaluate("i => i.width") == 1200
        page.keyboard.press("ArrowRight")
        page.get_by_text("Right, 1200 × 900").wait_for()
        page.keyboard.press("z")
        page.locator("dialog").wait_for(state="hidden")
        page.get_by_role("button", name="Full size").click()
        page.locator("dialog").wait_for(state="visible")
        page.keyboard.press("Escape")
        page.locator("dialog").wait_for(state="hidden")
    assert written(folder / "labels.jsonl") == []


@pytest.mark.browser
@pytest.mark.parametrize(("width", "stacked"), [(1280, False), (390, True)])
def test_a_page_fits_a_desk_and_a_phone(browser, tmp_path, width, stacked):
    folder = sampled(tmp_path, [f"prompt {i}" for i in range(30)])
    with serving(folder) as server:
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(server.url)
        for done in range(1, 7):
            pressed(page, "1")
            labelled(page, done, 30)  # a key that comes while the last one is on its way is not counted
        page.get_by_text(re.compile("s each, .* left")).wait_for(timeout=60_000)
        wait_for_pictures(page)
        left, right = (image.bounding_box() for image in page.get_by_role("img").all())
        assert (right["y"] >= left["y"] + left["height"]) == stacked == (left["x"] == right["x"])
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        undo = page.get_by_role("button", name="Undo").bounding_box()
        assert undo["y"] + undo["height"] <= 800  # all is seen without a scroll
        if where := os.environ.get("DIFFTUNE_SCREENSHOTS"):
            page.screenshot(path=f"{where}/label-{width}.png")
        page.close()
