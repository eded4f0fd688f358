"""ReNO's bench on a random network: equal budgets, the best of fresh noises, a bench that goes on, its table."""

import pytest
import torch

from tests.support import pipelines
from tests.support.benches import script

SEARCHED = ("neighbours", "spsa", "cma")


class Left:
    """In the place of tiny-clip: the picture's left half minus its right."""

    differentiable = True
    seen: list = []

    def __call__(self, images, prompts):
        self.seen.extend(prompts)
        left, right = images.chunk(2, dim=3)
        return left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def reward(bench, monkeypatch):
    monkeypatch.setattr(bench, "load", lambda name: Left())
    monkeypatch.setattr("rewards.compose.load", lambda name: Left())


@pytest.fixture(scope="module")
def bench():
    with script("bench_reno") as module:
        pipe = pipelines.sd()
        module.pipeline = lambda name: pipe
        module.PARTS = {
            "turbo": module.Part("tiny-turbo", 1, None, 5, prompts=1),
            "tiny": module.Part("tiny", 2, 3.0, 5, prompts=1),
        }
        yield module


def run_of(bench, method, part="turbo"):
    return next(run for run in bench.runs(part, bench.PARTS[part], [method]))


@pytest.mark.filterwarnings("error:the budget pays")  # DTS* would be best-of-n
@pytest.mark.parametrize("method", ["none", "reno", "best-calls", *SEARCHED, "dts-star"])
def test_a_method_calls_the_reward_as_often_as_it_says(bench, method, tmp_path):
    """As often as ReNO, or up to the next whole iteration of a search; counted at the reward."""
    if method == "cma":
        pytest.importorskip("cma")
    part = "tiny" if method == "dts-star" else "turbo"
    run = run_of(bench, method, part)
    Left.seen.clear()
    found = bench.METHODS[method](bench.PARTS[part], run, bench.Store(tmp_path / "results.jsonl"))
    assert found["calls"] == len(Left.seen) / len(run.prompts)
    more = {"none": (1, 1), "neighbours": (5, 8), "spsa": (5, 8), "cma": (5, 12)}.get(method, (5, 5))
    assert more[0] <= found["calls"] <= more[1]
    again = Left()(found["images"], run.prompts)
    assert torch.allclose(again, torch.tensor(found["rewards"]), atol=1e-5)


def test_the_best_of_fresh_noises_is_each_prompts_own(bench):
    part, run, alone = bench.PARTS["turbo"], run_of(bench, "best-calls"), []
    for n in range(4):
        seed = bench.FRESH + n * bench.FRESH + run.first
        alone.append(part.reno().optimize(run.prompts, 1, seed))
    rewards = torch.stack([result.rewards for result in alone])
    found = bench.best_of(part, run, lambda count: count < 4)
    assert torch.equal(torch.tensor(found["rewards"]), rewards.max(dim=0).values)
    for row, best in enumerate(rewards.argmax(dim=0).tolist()):
        assert torch.equal(found["images"][row], alone[best].images[row])
    assert len(set(rewards.argmax(dim=0).tolist())) > 1


def test_equal_time_is_renos_for_the_same_prompts(bench, tmp_path, monkeypatch):
    part, run, store = bench.PARTS["turbo"], run_of(bench, "best-time"), bench.Store(tmp_path / "results.jsonl")
    with pytest.raises(SystemExit, match="run the method reno first"):
        bench.best_time(part, run, store)
    store.write(run.key("reno"), {"seconds": 10.0})
    times = iter([0.0, 4.0, 8.0, 12.0] * 2)  # when it began, and after each noise, or each round of neighbours
    monkeypatch.setattr(bench, "clock", lambda: next(times))
    assert bench.neighbours_time(part, run, store)["calls"] == 1 + 2 * 4  # the first noise, and two rounds of four
    monkeypatch.setattr(bench, "best_of", counted)
    assert bench.best_time(part, run, store) == 3


def counted(part, run, goes_on):
    count = 0
    while goes_on(count):
        count += 1
    return count


@pytest.mark.slow
def test_parts_are_all_runs_once_and_a_bench_goes_on(bench, tmp_path, monkeypatch, capsys):
    made, measured = [], bench.measured
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(bench, "measured", lambda part, run, store: made.append(run) or measured(part, run, store))
    methods = ["none", "reno"]
    for count, n in enumerate((3, 1, 2), 1):
        bench.main(["turbo"], methods, 1, f"{n}/3", False, str(tmp_path))
        assert len(made) == 2 * count  # of three batches of two prompts
    assert len({(run.method, run.first) for run in made}) == 6
    bench.main(["turbo"], [*methods, "dts-star"], 1, "1/1", False, str(tmp_path))
    assert len(made) == 6
    said = capsys.readouterr().out
    assert "turbo: without dts-star" in said
    table = said[said.rindex("## turbo") :].splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table if line.startswith("| ")}
    assert rows.keys() == {"method", *methods} and rows["reno"][1] == "6" and rows["reno"][-2] == "5.0"
    means = {name: float(rows[name][-3]) for name in methods}
    assert means["reno"] > means["none"]
    found = [run["rewards"] for key, run in bench.Store(tmp_path / "results.jsonl").read().items() if "-reno-" in key]
    assert means["reno"] == pytest.approx(sum(map(sum, found)) / 6, abs=1e-4)
    assert [line.split(":")[0] for line in table if line.startswith("reno minus")] == ["reno minus none"]
