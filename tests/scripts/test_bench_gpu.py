"""scripts/bench_gpu.py and the random models that it measures."""

import pytest
import torch

from difftune.recipes import check_recipe
from tests.support.benches import script

MILLIONS = {"SD 1.5": 860, "SDXL": 2567, "SD3.5-M": 2243}  # of the published networks


@pytest.fixture(scope="module")
def bench():
    with script("benching"), script("bench_loops"), script("bench_models"), script("bench_gpu") as module:
        yield module


@pytest.mark.parametrize("size", MILLIONS)
def test_the_small_models_run_in_their_pipelines(bench, size):
    pipe = bench.Bench(small=True).pipe(size)
    images = pipe(bench.PROMPT, num_inference_steps=2, height=16, width=16, output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("size", MILLIONS)
def test_the_networks_have_the_published_size(bench, size):
    pipe = bench.SIZES[size]("meta", False)
    network = getattr(pipe, "transformer", None) or pipe.unet
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[size], rel=2e-3)


def test_what_is_measured_is_kept_and_an_error_is_not_and_does_not_cost_the_rest(bench, tmp_path, capsys, monkeypatch):
    calls, failures = [], []

    def fails():
        failures.append(1)
        raise RuntimeError("out\nof memory")

    part = lambda _: iter([("bad", fails), ("good", lambda: calls.append(1) or {"what": {"seconds": "1.0"}})])  # noqa: E731
    monkeypatch.setitem(bench.PARTS, "loops", bench.Part(part, 1))
    file, page = str(tmp_path / "gpu.jsonl"), tmp_path / "page.md"
    for _ in range(2):
        bench.main(["search", "loops"], 6, file, small=True, page=str(page))
    out = capsys.readouterr().out
    assert (
        out.count("| search | fk of SD 1.5, 8 particles | evaluations | 48 |") == 2
    )  # CFG twice, 3 steps, 8 particles
    assert out.count("| loops | bad | failed | RuntimeError: out of memory |") == 2
    assert out.count("| loops | good | seconds | 1.0 |") == 2 and calls == [1]
    assert failures == [1, 1] and "bad" not in (tmp_path / "gpu.jsonl").read_text()
    assert page.read_text().startswith("# On a GPU\n") and "| loops | good | seconds | 1.0 |\n" in page.read_text()
    bench.main(["loops"], -1, str(tmp_path / "other.jsonl"), small=True)
    assert "not begun within -1 minutes: loops / bad, loops / good" in capsys.readouterr().out


def test_a_part_begins_nothing_after_its_share_and_leaves_what_it_does_not_use(bench, tmp_path, capsys, monkeypatch):
    """A clock of minutes: `a` takes four for each measurement, and has six of nine; the others have what is left."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def part(minutes):
        def measure():
            now[0] += 60 * minutes
            return {"what": {"minutes": minutes}}

        return bench.Part(lambda _: ((str(i), measure) for i in range(4)), 2 if minutes == 4 else 0.5)

    monkeypatch.setattr(bench, "PARTS", {"a": part(4), "b": part(0.25), "c": part(0.05)})
    bench.main([], 9, str(tmp_path / "gpu.jsonl"), small=True)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "not begun within 9 minutes: a / 2, a / 3, b / 3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs(bench, tmp_path):
    with pytest.raises(SystemExit, match="pass --small"):
        bench.main([], 6, str(tmp_path / "gpu.jsonl"), small=False)


def test_reno_and_its_authors_loop_run_in_the_dtype_of_a_gpu(bench):
    half = bench.Bench(small=True)
    found = bench.compared(half, "SD 1.5", bench.bench_loops.reno, 1, 2)["what"]
    assert half.pipe("SD 1.5").unet.dtype == torch.bfloat16
    assert list(found) == ["authors", bench.bench_loops.PER_IMAGE, "peak of all"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", ["recipes", "search", "reno", "budget", "loops", "attention", "modes", "sizes"])
def test_every_part_runs_small(bench, part, tmp_path, capsys):
    """All but `compile`, which needs minutes of a compiler."""
    bench.main([part], 60, str(tmp_path / "gpu.jsonl"), small=True)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {part} ")]
    assert rows and not [row for row in rows if "| failed |" in row]


def test_the_settings_of_every_policy_recipe_are_valid(bench):
    """One batch is four images; a step of grpo and nft takes two groups of four."""
    parts = list(bench.recipes(bench.Bench(small=True)))
    configs = [measure.args[1] for _, measure in parts]
    assert [name.partition(",")[0] for name, _ in parts][2:] == list(bench.POLICY)
    for config in configs:
        check_recipe(config)
