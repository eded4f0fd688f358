"""The recipes' bench: what it counts, what it measures and how it tells it, without a training."""

import json
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from guidance.guided import guided
from guidance.methods.catalogue import CFG
from solvers.latent import LatentModel
from solvers.rollout.modes import rollout
from solvers.samplers.catalogue import euler
from tests.support.benches import script
from tests.support.pipelines import sd


@pytest.fixture(scope="module")
def bench():
    with script("bench_recipes") as module:
        yield module


@pytest.mark.parametrize(("gradient", "kept"), [("truncated:1", 1), ("truncated:3", 3), ("checkpoint", 4)])
def test_alignprop_costs_what_the_formula_says(gradient, kept, bench):
    """2 T + 6 K an image under CFG: T forwards, K of them recomputed and differentiated, in two branches."""
    model = LatentModel(sd())
    predict = guided(model.denoiser, CFG(2.0), model.encode(["a", "b", "c"]))
    with bench.counted(bench.Forwards()) as found:
        path = rollout(euler, predict, model.noise(3), model.levels(4), gradient)
        path.x.sum().backward()
    assert found.total == 3 * (2 * 4 + 6 * kept)


def test_plain_sampling_and_what_is_not_the_denoiser_cost_what_they_are(bench):
    model = LatentModel(sd())
    predict = guided(model.denoiser, CFG(2.0), model.encode(["a"]))
    with bench.counted(bench.Forwards()) as found, torch.no_grad():
        x = rollout(euler, predict, model.noise(1), model.levels(4), "full").x
        model.decode(x)
        model.encode(["b"])
    assert found.total == 2 * 4
    model.denoiser.network(x, 1, model.encode(["a"])["cond"]["encoder_hidden_states"])  # no longer counted
    assert found.total == 2 * 4


def test_a_limit_asks_for_the_end_once(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "kill", lambda process, number: asked.append((process, number)))
    forwards = bench.Forwards(limit=5)
    for rows in (4, 1, 3):
        forwards.add(rows)
    assert asked == [(os.getpid(), signal.SIGTERM)]


def test_the_first_row_starts_the_clock(bench):
    started = []
    forwards = bench.Forwards(clock=SimpleNamespace(start=lambda: started.append(forwards.total)))
    for _ in range(3):
        forwards.add(2)
    assert started == [0]


def test_the_cap_is_of_the_seconds_that_the_process_took(bench, monkeypatch):
    """Not of those that pass while others have the processor; one that is cancelled asks for nothing."""
    taken, asked = iter([0.0, 0.0, 0.3, 1.0]), threading.Event()
    monkeypatch.setattr(bench, "clock", lambda: next(taken))
    monkeypatch.setattr(os, "kill", lambda process, number: asked.set() if number == signal.SIGTERM else None)
    alarm = bench.Alarm(1.0)
    monkeypatch.setattr(alarm.cancelled, "wait", lambda left: waits.append(left) or False)
    waits = []
    alarm.run()
    assert asked.is_set() and waits == [1.0, 0.7]
    asked.clear()
    monkeypatch.setattr(bench, "clock", lambda: 0.0)
    cancelled = bench.Alarm(1.0)
    cancelled.cancel()
    cancelled.run()
    assert not asked.is_set()


def line(recipe, seed, after, cost, ended=True):
    """Three prompts; the reward rises from 0.5 to `after`."""
    values = {"reward_before": [0.5] * 3, "reward_after": after, "oracle_before": [0.0, 1.0, 0.5]}
    values |= {"oracle_after": [0.5, 1.0, 0.5], "vendi_before": [2.0] * 3, "vendi_after": [1.5] * 3, "drift": [0.1] * 3}
    values |= {"coverage_before": [0.9] * 3, "coverage_after": [0.8] * 3}
    values |= {"classifier_before": [-1.0], "classifier_after": [-2.0]}  # one of the prompts has one object
    point = {"step": 1, "seconds": cost / 10, "forward_equivalents": cost, **values}
    settings = {"reward": ["tiny-clip=1.0", "jpeg=-0.5"]}
    run = {"run": f"{recipe}-{seed}", "recipe": recipe, "seed": seed, "ended": ended, "settings": settings}
    return {**run, "points": [point]}


def test_a_row_is_the_mean_over_seeds_and_its_interval_is_over_prompts(bench):
    lines = [line("ddpo", 0, [0.6, 0.7, 0.8], 100), line("ddpo", 1, [0.8, 0.9, 1.0], 300, ended=False)]
    (_, _, row) = bench.table(lines).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["ddpo (1 stopped at the cap)", "tiny-clip, jpeg=-0.5", "2", "0.5000", "0.8000"]
    assert cells[5].startswith("+0.3000 [+0.2") and cells[5].endswith("]")
    assert cells[6] == "0.500 to 0.667" and cells[8] == "2.000 to 1.500"
    assert cells[10].startswith("-0.100 [") and cells[11].startswith("-1.000 [")
    assert cells[-2:] == ["20", "200"]


def test_a_duel_tells_when_a_level_was_reached_or_that_it_was_not(bench):
    said = bench.duel({"alignprop": line("alignprop", 0, [0.9] * 3, 100), "ddpo": line("ddpo", 0, [0.6] * 3, 1000)})
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in said.splitlines()[2:6]]
    assert [row[1:] for row in rows] == [
        ["alignprop", "100", "10"],
        ["ddpo", "not reached", "not reached"],
        ["alignprop", "100", "10"],
        ["ddpo", "1000", "100"],
    ]
    assert "0.5000" in said.splitlines()[-1]


@pytest.mark.parametrize(("count", "steps"), [(1, [9]), (3, [0, 4, 9]), (99, list(range(10)))])
def test_checkpoints_are_chosen_evenly_with_the_last(count, steps, bench):
    paths = [Path(str(i)) for i in range(10)]
    assert [int(path.name) for path in bench.chosen(paths, count)] == steps


def test_a_finished_run_is_not_run_again(bench, tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    bench.Store(results).write("alignprop-0", line("alignprop", 0, [1.0] * 3, 1))
    with results.open("a") as out:
        out.write('{"key": "torn')
    monkeypatch.setattr(bench, "run", lambda job, results: pytest.fail("it was"))
    bench.follow(bench.Job("alignprop", 0, tmp_path / "alignprop-0"), results)
    assert list(bench.Store(results).read()) == ["alignprop-0"]


@contextmanager
def many_threads():
    """Within, torch begins with two threads; then it has as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_training_lines_tell_the_cost_and_a_stop_is_no_failure(bench, tmp_path, monkeypatch):
    threads = []

    def command(arguments, prog_name):
        threads.append(torch.get_num_threads())
        bench.records.append(tmp_path / "metrics.jsonl", {"step": 1})
        raise SystemExit(143 if "--stopped" in arguments else 0 if "--whole" in arguments else 2)

    monkeypatch.setattr(bench.cli, "main", command)
    job = bench.Job("alignprop", 0, tmp_path, ("--stopped",))
    append = bench.records.append
    with many_threads():
        assert not bench.trained(job)
    assert threads == [1]  # of the process that trains: its seconds are one thread's
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written.pop("process_seconds") >= 0 and written == {"step": 1, "forward_equivalents": 0.0}
    assert bench.records.append is append
    with pytest.raises(SystemExit):
        bench.trained(bench.Job("alignprop", 0, tmp_path, ()))


def test_a_run_is_measured_on_its_way_and_at_its_end_under_cfg_too(bench, tmp_path, monkeypatch):
    """At the steps that the job names; each beside what the model did before, sampled alike."""
    asked = []

    def trained(job):
        assert torch.get_num_threads() == 1
        job.folder.mkdir()
        settings = {"num_inference_steps": 20, "guidance": "apg", "guidance_scale": 3.0, "guidance.eta": 0.5}
        (job.folder / bench.CONFIG).write_text(bench.yaml.safe_dump({"reward": ["oracle"], **settings}))
        for step in (5, 10, 15):
            cost = {"process_seconds": step / 10, "forward_equivalents": 100.0 * step}
            bench.records.append(job.folder / bench.METRICS, {"step": step, **cost})

    def measured(job, settings, lora):
        asked.append((None if lora is None else lora.name, settings))
        found = {name: torch.full((4, 1), float(lora is not None)) for name in (*bench.JUDGES, "latents")}
        return {**found, "vendi": found["vendi"][:2]}

    monkeypatch.setattr(bench, "trained", trained)
    monkeypatch.setattr(bench, "measured", measured)
    monkeypatch.setattr(bench, "before", lambda job, settings: measured(job, settings, None))
    monkeypatch.setattr(
        bench.checkpoint, "checkpoints", lambda folder: [folder / f"checkpoint-{step}" for step in (5, 10, 15)]
    )
    job = bench.Job("grpo", 0, tmp_path / "grpo-0", images=2, points=2, steps=7, beside=2.0)
    with many_threads():
        bench.run(job, tmp_path / "results.jsonl")
    found = bench.Store(tmp_path / "results.jsonl").read()["grpo-0"]
    assert [(p["step"], p["forward_equivalents"], p["seconds"]) for p in found["points"]] == [
        (5, 500.0, 0.5),
        (15, 1500.0, 1.5),
    ]
    own = {"guidance": "apg", "guidance_scale": 3.0, "guidance.eta": 0.5}
    other = {"guidance": "cfg", "guidance_scale": 2.0}
    places = [None, "checkpoint-5", "checkpoint-15", "checkpoint-15", None]
    assert [place for place, _ in asked] == places
    for (_, settings), guidance in zip(asked, [own] * 3 + [other] * 2, strict=True):
        assert settings == {"reward": ["oracle"], "num_inference_steps": 7, **guidance}
    assert found["beside"]["oracle_after"] == [1.0, 1.0] and found["beside"]["oracle_before"] == [0.0, 0.0]
