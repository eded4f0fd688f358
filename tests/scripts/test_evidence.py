"""The evidence: a measurement is made once, what is claimed follows from what was measured, and the page tells it."""

import fcntl
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.benches import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make():
    with script("make_evidence") as module:
        yield module


@pytest.fixture
def results(make, tmp_path):
    return make.Results(tmp_path / "evidence")


def row_in(make, made, name="part/one", settings=None, group="", value=1.0):
    from evidence.rows import Row

    return Row(name, settings or {"steps": 3}, ("tiny-clip",), lambda: made.append(name) or {"value": value}, group)


# ------------------------------------------------------------------------------------------------ measurements


def test_a_row_is_measured_once_until_its_settings_or_the_weights_change(make, results, monkeypatch):
    made = []
    row = row_in(make, made)
    assert results.read(row) is None and results.all_of([row]) is None
    assert [results.measured(row), results.measured(row), results.read(row)] == [{"value": 1.0}] * 3
    assert made == ["part/one"] and results.all_of([row]) == [{"value": 1.0}] and results.all_of([]) is None
    entry = json.loads(results.file(row).read_text())
    assert entry["settings"] == {"steps": 3} and entry["seconds"] >= 0 and "torch" in entry["on"]
    assert results.read(row_in(make, made, settings={"steps": 4})) is None
    text = results.file(row).read_text()
    results.file(row).write_text(text[:-9])  # no writer of ours leaves such a file
    assert results.read(row) is None
    results.file(row).write_text(text)
    monkeypatch.setattr("evidence.rows.weights", lambda *names: "others")
    assert results.read(row) is None
    results.measured(row)
    assert made == ["part/one"] * 2


def test_one_process_at_a_time_makes_a_row(make, results):
    """What another one has measured meanwhile is read."""
    made, held = [], []
    row = row_in(make, made)

    def measure():
        with (results.folder / "locks" / row.name).open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(True)
        return {"value": 2.0}

    assert results.measured(replace(row, measure=measure)) == {"value": 2.0} and held
    with (results.folder / "locks" / row.name).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert results.measured(row) == {"value": 2.0} and not made


def test_parts_are_all_rows_once_and_keep_groups_together(make):
    rows = [row_in(make, [], f"a/{i}", group=f"group {i % 3}") for i in range(9)] + [row_in(make, [], "a/last")]
    parts = [make.part_of(rows, f"{i}/2") for i in (1, 2)]
    assert sorted(row.name for part in parts for row in part) == sorted(row.name for row in rows)
    assert not {row.group for row in parts[0]} & {row.group for row in parts[1]}


def test_every_row_has_a_file_of_its_own(make, results):
    """In the whole evidence, and in the quick one: two rows of one name would take each other's place."""
    for quick in (False, True):
        given = Namespace(quick=quick, seeds=None, budgets=None, recipes=None, prompts=None, cap=None)
        found = make.sections(make.sizes(given), results)
        names = [row.name for section in found.values() for row in section.rows]
        assert len(names) == len(set(names)) > 50
        assert all(name.split("/")[0] == part for part, s in found.items() for name in [row.name for row in s.rows])
        assert not any(section.text or section.claims for section in found.values())  # nothing was measured


# ------------------------------------------------------------------------------------------------ search


def test_the_share_is_where_the_curve_reaches_the_others_end(make):
    slow = np.tile(np.linspace(0.1, 1.0, 10), (6, 1))
    fast = np.minimum(4 * slow, 1.2)
    found = make.search.share(fast, slow)
    assert (found.score, found.low, found.high) == (0.3, 0.3, 0.3) and str(found) == "0.30 [0.30, 0.30]"
    never = make.search.share(slow - 0.01, slow)
    assert str(never) == "above 1 [above 1, above 1]"
    spread = make.search.share(np.minimum(np.linspace(1, 5, 6)[:, None] * slow, 1.2), slow)
    assert spread.low < spread.score < spread.high


@pytest.fixture
def searched(make, monkeypatch):
    """Samples of reward .1, .2, ... an image for best-of-n; dts-star twice as fast; fk cannot begin."""

    def measured(run, prompts, setting):
        if run.method == "fk":
            return {"refused": "no"}
        gain = 0.2 if run.method == "dts-star" else 0.1
        points = [[10 * n, n, gain * n, float(n > 1)] for n in range(1, run.nfe // 10 + 1)]
        return {"seconds": 0.0, "points": [points for _ in prompts]}

    monkeypatch.setattr(make.search.bench_search, "measured", measured)


def test_a_search_that_needs_half_of_the_evaluations_is_told_so(make, results, searched):
    size = make.search.QUICK._replace(methods=("best-of-n", "dts-star", "fk"), seeds=(0, 1))
    rows = make.search.rows(size)
    assert len(rows) == 2 * 2 * (1 + 1 + 2)  # seeds, blocks, and runs: one of what goes on, one a budget of fk
    assert not make.search.section(size, results).claims
    for row in rows:
        results.measured(row)
    found = make.search.section(size, results)
    dts, fk = found.claims
    assert dts.ours.startswith("0.50 [0.50, 0.50] of the 20; 0.50 [0.50, 0.50] of the 40 evaluations; +0.4000 [")
    assert dts.holds is False and dts.verdict == "does not hold"
    assert fk.ours == "cannot begin at 40 evaluations" and fk.holds is None
    assert "| dts-star | 40 | 0.800 [" in found.text and "| fk | 20 | cannot begin |" in found.text
    assert all("fk" not in row.name or row.settings["run"][0] == "fk" for row in rows)


def test_rectified_cfgpp_is_beside_cfg_of_the_same_nominal_scale(make):
    size, high = make.guidance.Size(), f"{make.guidance.HIGH:g}"
    assert {"rectified-cfgpp", "mambo-g", "fbg"} < {
        row.name.split("/")[1].rsplit("-", 1)[0] for row in make.guidance.cells(size)
    }
    known = {f"rectified-cfgpp-{high}": {"holds": [True] * 6}, f"cfg-{high}": {"holds": [False] * 5 + [True]}}
    (claim,) = make.guidance.rectified_claims(size, known)
    assert claim.holds is True and claim.ours.startswith("oracle +0.833 [") and high in claim.ours
    assert not list(make.guidance.rectified_claims(size, {}))


# ------------------------------------------------------------------------------------------------ noise and training


def test_a_method_is_told_by_its_prompts_means_over_seeds(make):
    part = {"prompts": ["a", "b"], "calls": 4, "seconds": 2.0}
    found = make.noise.told([{**part, "holds": [True, False], "scores": [0.5, 0.1]},
                             {**part, "holds": [False, False], "scores": [0.7, 0.3]}])  # fmt: skip
    assert found.holds == [0.5, 0.0] and found.scores == pytest.approx([0.6, 0.2])
    assert (found.calls, found.seconds) == (4, 1.0)


def test_noise_claims_are_of_the_oracle_and_paired(make):
    known = {"none": ([0.0] * 8, 0.1), "best-time": ([1.0] * 8, 0.3), "reno": ([0.9, 1.0] * 4, 0.9)}
    told = {name: make.noise.Told(holds, [score] * 8, 1, 1.0) for name, (holds, score) in known.items()}
    first, second = make.noise.claims_of(told)
    assert first.holds is True and first.ours.startswith("oracle, held out: +0.950 [")
    assert second.holds is False and second.ours.startswith("oracle, held out: -0.050 [")
    text = make.noise.methods_text(make.noise.QUICK, told)
    assert "| reno | 0.950 [" in text and "| best-of-N, ReNO's time | 1.000 [" in text


def line_of(recipe, after, cost=100.0):
    point = {"step": 1, "seconds": 60.0, "forward_equivalents": cost, "drift": [0.1] * 4}
    for judge in ("reward", "oracle", "vendi", "coverage", "classifier"):
        point |= {f"{judge}_before": [0.5] * 4, f"{judge}_after": after}
    return {"recipe": recipe, "seed": 0, "ended": True, "settings": {"reward": ["oracle=1.0"]}, "points": [point]}


def test_a_recipe_holds_if_the_oracle_rises_and_says_where_it_is_in_reward(make):
    up, down = [0.6, 0.7, 0.8, 0.9], [0.5, 0.5, 0.4, 0.6]
    risen, same = (make.training.claim_of("ddpo", [line_of("ddpo", after)] * 2) for after in (up, down))
    assert risen.holds is True and "in-reward, held-out prompts: +0.250 [" in risen.ours and "2 seeds" in risen.ours
    assert same.holds is None and same.verdict == "not told apart"
    assert "held out" in make.training.claim_of("alignprop", [line_of("alignprop", up)]).ours


def test_a_duel_counts_the_evaluations_to_the_others_best(make):
    lines = {"alignprop": line_of("alignprop", [0.9] * 4, 50.0), "ddpo": line_of("ddpo", [0.7] * 4, 500.0)}
    claim = make.training.duel_claim(lines, None)
    assert claim.holds and claim.ours == (
        "DDPO's best: +0.200 of held-out reward; AlignProp has +0.400, and 10 times fewer evaluations to it"
    )
    lines["alignprop"] = line_of("alignprop", [0.6] * 4)
    assert make.training.duel_claim(lines, None).holds is False


def test_curves_are_of_one_flow_without_guidance_and_without_end(make, results):
    rows = make.training.curve_rows(make.training.Size(), results)
    assert set(rows) == {"ddpo", "grpo", "nft", "d3po", "alignprop", "adjoint-matching"}
    for recipe, (first, *others) in rows.items():
        flags = first.settings["flags"]
        assert flags[:4] == ("--model", "tiny-flow", "--guidance", "none") and "1000000" in flags and len(others) == 2
        gradient = recipe in ("alignprop", "adjoint-matching")
        assert flags[5] == (make.training.SMOOTH if gradient else "oracle")
        assert first.settings["points"] > 3 and first.settings["beside"] == 2.0
    assert {row.name for of in rows.values() for row in of} <= {
        row.name for row in make.training.rows(make.training.Size(), results)
    }


def test_a_curve_tells_each_stage_and_what_a_rise_cost(make):
    """Two seeds: the rise is the mean of both, and is reached at the second of three stages."""
    lines = [line_of("grpo", [0.5] * 4), line_of("grpo", [0.5] * 4)]
    for line, ends in zip(lines, ([0.5, 0.7, 0.9], [0.5, 0.55, 0.8]), strict=True):
        own = [line_of("grpo", [end, end + 0.01] * 2, 100.0 * (i + 1))["points"][0] for i, end in enumerate(ends)]
        line |= {"points": own, "beside": own[0]}
    found = make.training.curves_text(make.training.Size(), {"grpo": lines})
    assert "| grpo | 1 | 100 | 60 | 0.505 | +0.005 [" in found
    assert "| grpo | 1 | 200 | 60 | 0.630 | +0.130 [" in found
    assert "| grpo | 1 | 300 | 60 | 0.855 | +0.355 [" in found
    (end,) = [row for row in found.splitlines() if row.startswith("| grpo | 0, 0 |")]
    assert end.startswith("| grpo | 0, 0 | +0.355 [") and "| +0.005 [" in end and end.endswith("| 200 | 60 |")
    assert "in-reward" in found and make.training.curve_claim("grpo", lines).holds is True
    flat = [line_of("alignprop", [0.5] * 4) | {"beside": line_of("alignprop", [0.5] * 4)["points"][0]}]
    assert make.training.ends_table({"alignprop": flat}).endswith("| not reached | not reached |")
    assert "oracle, held out" in make.training.curve_claim("alignprop", flat).ours


# ------------------------------------------------------------------------------------------------ the page


def test_the_readme_has_a_row_for_each_claim_that_it_shows(make):
    """Rows that were measured are renewed in their places, and nothing else is touched."""
    from evidence.rows import Claim

    text = (ROOT / "README.md").read_text()
    names = [make.page.NAMES.get(name, name) for name in make.page.README_ROWS]
    assert make.page.readme(text, []) == text
    claims = [Claim(name, "x.md", "says", "found", None, "run") for name in (*make.page.README_ROWS, "another")]
    lines = make.page.readme(text, claims).splitlines()
    first = lines.index(make.page.HEADING) + 2
    assert [make.page.named(line) for line in lines[first + 2 : first + 2 + len(names)]] == names
    assert all("| not told apart: found ([all](docs/evidence.md)) | `run` |" in line for line in lines[first + 2 :][:6])
    assert len(lines) == len(text.splitlines())
    with pytest.raises(ValueError, match="has no table"):
        make.page.readme("# nothing\n", [])


def test_what_fails_is_named_and_the_others_are_measured(make, results, monkeypatch, capsys):
    def measured(run, prompts, setting):
        if run.method == "dts-star":
            raise RuntimeError("no memory")
        return {"seconds": 0.0, "points": [[[10, 1, 0.5, 1.0]] for _ in prompts]}

    monkeypatch.setattr(make.search.bench_search, "measured", measured)
    size = make.search.QUICK._replace(methods=("best-of-n", "dts-star", "fk"))
    failed = make.measure("search", size, results, "1/1", "-40-")
    assert failed == ["search/dts-star-40-0-000", "search/dts-star-40-0-002"]
    assert "dts-star-40-0-002 failed: no memory" in capsys.readouterr().out
    made = [row.name for row in make.search.rows(size) if results.read(row)]
    assert len(made) == 4 and not [name for name in made if "-20-" in name or "dts" in name]


def test_the_page_gets_its_place_once(make):
    once = make.page.navigation((ROOT / "mkdocs.yml").read_text())
    assert once.count("evidence.md") == 1 and "      - benchmarks.md\n      - evidence.md\n" in once
    assert make.page.navigation(once) == once


def test_the_page_tells_claims_tables_and_costs(make, results, searched):
    size = make.search.QUICK._replace(methods=("best-of-n", "dts-star"))
    for row in make.search.rows(size):
        results.measured(row)
    text = make.page.page({"search": make.search.section(size, results)}, results)
    assert "| [dts-star](search/trees.md) | best-of-N's reward with a fifth" in text
    assert "`make evidence ROWS=search`: 4 of 4 measurements" in text
    plan = make.planned({"search": make.search.section(size, results)}, results)
    assert "| search | samples | 2 | 2 |" in plan


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guidance", "search", "noise", "training"])
def test_a_section_is_measured_in_small_numbers_and_told(make, name, tmp_path, monkeypatch):
    given = dict.fromkeys(("seeds", "budgets", "recipes", "prompts", "cap"))
    given |= {"quick": True, "plan": False, "folder": tmp_path, "part": "1/1", "rows": [name], "only": ""}
    if name == "training":
        given["recipes"] = ["drtune", "ddpo"]
    make.main(Namespace(**given))
    text = (tmp_path / "docs/evidence.md").read_text()
    assert text.count("\n## ") == 1 and "| --- |" in text.replace("|---|", "| --- |")
    monkeypatch.setattr(make.Results, "measured", lambda self, row: pytest.fail(f"{row.name} was measured again"))
    make.main(Namespace(**given))
    assert (tmp_path / "docs/evidence.md").read_text() == text
