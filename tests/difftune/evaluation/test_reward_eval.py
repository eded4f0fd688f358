"""Evaluation by any reward: lists of prompts, statistics of pairs, resumption, and what is marked."""

import csv
import gc
import hashlib
import json
import weakref
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from difftune.configs.images import EvalConfig
from difftune.errors import RunError, UserError
from difftune.evaluation import drawn, judged, run_folder
from difftune.evaluation.paired import compare_prompts, holm, sign_flip_p
from difftune.evaluation.prompt_lists import ELSEWHERE, FETCHED, FOLDER, SHIPPED, read_entries
from difftune.evaluation.results import Evaluated, change_of, pair_up, read_evaluated, summarise
from difftune.evaluation.run_folder import run_eval
from difftune.evaluation.trained import is_trained, rewards_of_model, rewards_of_pictures
from rewards import hub
from rewards.hub import revisions
from rewards.registry import REWARDS, Entry
from rewards.simple import Contrast
from tests.support import checkpoints
from tests.support.pipelines import sd

# ------------------------------------------------------------------------------------------------ lists of prompts

PUBLISHED = {  # prompts, categories, and the hash of the file as its authors have it
    "geneval": (553, 6, "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"),
    "parti": (1632, 12, "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"),
    "imagereward": (100, 1, "34682e824ebb3ad8e2531b3cde1b362dc72e1e29946ff6fab77bb49e9edb4b21"),
    "ocr": (1018, 1, "4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_list_is_as_it_was_published(name):
    count, kinds, digest = PUBLISHED[name]
    assert hashlib.sha256((FOLDER / SHIPPED[name]).read_bytes()).hexdigest() == digest
    listed = read_entries(name)
    assert len(listed) == len({entry["prompt"] for entry in listed}) == count
    assert len({entry["category"] for entry in listed}) == kinds
    assert all(entry["prompt"].strip() == entry["prompt"] != "" for entry in listed)


COMPBENCH = {  # the file of each category, and the hash of it as its authors have it, in 16 digits
    "3d_spatial": "c9953597315f36a5", "color": "1634259756dbc77d", "complex": "1b808018b8d9916d",
    "non_spatial": "04c56cc9ac441dc9", "numeracy": "dad8df141604b70b", "shape": "37e1a276906c7ea9",
    "spatial": "8707a1d7e42ce300", "texture": "fbb5363515b4a280",
}  # fmt: skip


def test_t2i_compbench_has_eight_categories_as_they_were_published():
    files = sorted((FOLDER / SHIPPED["t2i-compbench"]).iterdir())
    assert {f.stem: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files} == COMPBENCH
    listed = read_entries("t2i-compbench")
    prompts = {line.strip() for file in files for line in file.read_text().splitlines() if line.strip()}
    assert {entry["prompt"] for entry in listed} == prompts and len(listed) == len(prompts)
    assert {entry["category"] for entry in listed} == COMPBENCH.keys()


def test_hpd_v2_is_fetched_from_the_hub_at_one_commit(tmp_path, monkeypatch):
    """In its layout: four lists of texts."""
    (tmp_path / "benchmark").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / "benchmark" / f"{style}.json").write_text(json.dumps([f"{style} of a cat", f"{style} of a dog"]))
    asked = []

    def download(repository, file, revision, repo_type):
        asked.append((repository, revision, repo_type))
        return str(tmp_path / file)

    with pytest.raises(OSError, match="ymhao/HPDv2/benchmark/anime.json is not in the cache and HF_HUB_OFFLINE is set"):
        read_entries("hpd-v2")
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", download)
    listed = read_entries("hpd-v2")
    assert set(asked) == {("ymhao/HPDv2", FETCHED["hpd-v2"].revision, "dataset")}
    assert [entry["category"] for entry in listed] == [c for c in FETCHED["hpd-v2"].files for _ in range(2)]
    assert listed[3] == {"prompt": "concept-art of a dog", "category": "concept-art"}
    assert len(read_entries("hpd-v2", 1)) == 4


def test_geneval_has_its_six_categories():
    found = Counter(entry["category"] for entry in read_entries("geneval"))
    assert found == {"position": 100, "color_attr": 100, "two_object": 99, "colors": 94, "single_object": 80,
                     "counting": 80}  # fmt: skip
    assert Counter(entry["category"] for entry in read_entries("geneval", 3)) == dict.fromkeys(found, 3)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_list_that_may_not_be_shipped_says_why(name):
    with pytest.raises(UserError, match=f"{name} is not shipped, since .*: give "):
        read_entries(name)


def test_files_of_prompts_with_categories(tmp_path):
    rows = [('a "cat", tall', "animals"), ("a dog", ""), ('a "cat", tall', "again")]
    wanted = [{"prompt": rows[0][0], "category": "animals"}, {"prompt": "a dog", "category": ""}]
    files = {
        "a.jsonl": "\n".join(json.dumps({"prompt": p, "tag": c, "more": 1}) for p, c in rows),
        "a.json": json.dumps([{"text": p, "category": c} for p, c in rows]),
        "a.tsv": "Prompt\tCategory\n" + "\n".join(f"{p}\t{c}" for p, c in rows),
    }
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([("caption", "category"), *rows])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in (*files, "a.csv"):
        assert read_entries(str(tmp_path / name)) == wanted, name
    for name, text, said in [
        ("b.json", "{}", "it is not a list"),
        ("b.json", "[1]", "record 1 of .* has no prompt"),
        ("b.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "record 2 of .* has no prompt"),
        ("b.jsonl", "{", "cannot read the prompts"),
        ("b.csv", "prompt\n", "has no prompt"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=said):
            read_entries(str(tmp_path / name))


# ------------------------------------------------------------------------------------------------ statistics


def test_the_sign_flip_test_counts_all_signs():
    for d in ([1.0, 1.0, 1.0], [0.3, -0.1, 0.2, 0.0], [0.0, 0.0]):
        sums = [abs(np.dot(signs, d)) for signs in product([-1, 1], repeat=len(d))]
        assert sign_flip_p(d) == pytest.approx(np.mean([s >= abs(sum(d)) - 1e-12 for s in sums]))
    assert sign_flip_p([1.0] * 3) == 2 / 8
    many = np.random.default_rng(0).normal(0.2, 1, 60)
    z = abs(many.sum()) / np.sqrt((many**2).sum())  # under random signs, nearly standard normal
    assert sign_flip_p(many) == pytest.approx(2 * torch.special.ndtr(torch.tensor(-z)).item(), abs=0.02)
    assert sign_flip_p([1.0] * 60) == 1 / 10_001


def test_holms_adjustment_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_the_same_scores_are_no_change():
    change = compare_prompts([1.0, 2.0, 5.0], [1.0, 2.0, 5.0])
    assert (change.difference.score, change.p, change.wins.rate) == (0.0, 1.0, 0.5)
    assert not change.difference.excludes_zero
    worse = compare_prompts([1.0, 3.0], [0.0, 1.0], higher_is_better=False)
    assert (worse.wins.rate, worse.difference.score) == (0.0, 1.5)
    one = compare_prompts([1.0], [0.0])
    assert (one.difference.low, one.difference.high) == (-np.inf, np.inf) and not one.difference.excludes_zero


@pytest.mark.slow
def test_a_shift_is_covered():
    """1000 pairs of runs on 60 prompts whose rewards have scales of their own: the interval holds the true shift."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        then = random.normal(0, 3, 60)
        now = then + 0.5 + random.normal(0, 1, 60)
        e = compare_prompts(now, then).difference
        found.append(e.low <= 0.5 <= e.high)
    assert np.mean(found) == pytest.approx(0.95, abs=0.015)


def scored(rows, first_seed=0, reward="brightness"):
    """An evaluation of {prompt: scores of its pictures}."""
    images = [drawn.EvalImage("", p, "", first_seed + i) for p, values in rows.items() for i in range(len(values))]
    return Evaluated(images, {reward: [v for values in rows.values() for v in values]})


def test_pairs_are_of_the_seeds_that_both_have_or_of_prompts():
    now, then = scored({"a": [1.0, 3.0], "b": [0.0]}), scored({"a": [0.5], "c": [9.0]})
    pairs = pair_up(now, then)
    assert (pairs.prompts, pairs.by) == (["a"], "prompt and seed")
    assert change_of(now, then, pairs, "brightness").difference.score == 0.5
    mixed = [drawn.EvalImage("", "a", "", 1), drawn.EvalImage("", "b", "", 5)]  # b has no seed in common
    pairs = pair_up(now, Evaluated(mixed, {"brightness": [1.0, 4.0]}))
    assert (pairs.prompts, pairs.keys) == (["a"], {("a", 1)})
    other = scored({"b": [1.0, 2.0], "a": [1.0]}, first_seed=7)
    pairs = pair_up(now, other)
    assert (pairs.prompts, pairs.by) == (["a", "b"], "prompt")
    assert change_of(now, other, pairs, "brightness").difference.score == pytest.approx((1.0 - 1.5) / 2)
    with pytest.raises(UserError, match="shares no prompt"):
        pair_up(now, scored({"d": [1.0]}))


def of_kinds(scores, rewards):
    """An evaluation of one picture of each prompt, every other prompt of kind "x"."""
    images = [drawn.EvalImage("", str(i), "xy"[i % 2], 0) for i in range(len(scores))]
    return Evaluated(images, dict.fromkeys(rewards, scores))


@pytest.mark.parametrize(
    ("rise", "rewards", "counts"),
    [
        ([1.0, 2.0], ["jpeg"], False),  # an interval of [1, 2], but p = 0.5
        ([1.0, 2.0, 1.5, 1.2, 1.1, 1.3], ["jpeg"], True),  # p = 2 / 64
        ([1.0, 2.0, 1.5, 1.2, 1.1, 1.3], ["jpeg", "contrast"], False),  # and 4 / 64 by Holm
    ],
)
def test_a_difference_counts_by_its_interval_and_its_adjusted_p(rise, rewards, counts):
    found = summarise(of_kinds(rise, rewards), of_kinds([0.0] * len(rise), rewards))["rewards"]
    for facts in found.values():
        assert facts["difference"]["low"] > 0 and facts["difference"]["counts"] is counts


def test_categories_have_their_prompts_and_their_difference():
    now, then = of_kinds([1.0, 5.0, 3.0], ["jpeg"]), of_kinds([0.5], ["jpeg"])
    kinds = summarise(now, then)["rewards"]["jpeg"]["categories"]
    assert (kinds["x"]["score"], kinds["x"]["n_prompts"], kinds["y"]["n_prompts"]) == (2.0, 2, 1)
    assert (kinds["x"]["difference"]["score"], kinds["x"]["difference"]["n_prompts"]) == (0.5, 1)
    assert "difference" not in kinds["y"]  # the baseline has no prompt of this kind


# ------------------------------------------------------------------------------------------------ a model's pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red circle\n")
    about = {"num_inference_steps": 1, "batch_size": 2, "images_per_prompt": 2, "reward": ("brightness", "jpeg")}
    return EvalConfig(model=model, prompts=str(tmp_path / "prompts.txt"), output_dir=str(tmp_path / "out"), **about)


def steady(found):
    """What does not depend on the clock and the folder."""
    return {k: v for k, v in found.items() if k not in ("seconds", "pictures", "settings")}


def test_a_killed_evaluation_goes_on_where_it_was(config, tmp_path, monkeypatch):
    whole = run_eval(replace(config, output_dir=str(tmp_path / "whole")))
    write, drew = drawn.write_batch, []

    def failing(drawing, number, images, batch):
        drew.append(number)
        if len(drew) == 2:
            raise KeyboardInterrupt
        write(drawing, number, images, batch)

    monkeypatch.setattr(drawn, "write_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        run_eval(config)
    with pytest.raises(UserError, match="go on with it by --resume_from_checkpoint latest"):
        run_eval(config)
    with pytest.raises(UserError, match="were drawn with seed=0, not 1"):
        run_eval(replace(config, resume_from_checkpoint="latest", seed=1))
    found = run_eval(replace(config, resume_from_checkpoint="latest"))
    assert drew == [0, 1, 1, 2] and steady(found) == steady(whole)
    for image in found["images"]:
        files = [tmp_path / folder / "images" / image["file"] for folder in ("out", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == found
    assert found["settings"]["reward"] == ["brightness", "jpeg"] and found["nfe"] == 2

    monkeypatch.setattr(drawn, "open_pipeline", lambda *_: pytest.fail("a further reward needs no picture"))
    monkeypatch.setattr(judged, "load", lambda name: {"contrast": Contrast}[name]())  # of the others' there are scores
    more = run_eval(replace(config, resume_from_checkpoint="latest", reward=("jpeg", "contrast")))
    assert more["rewards"]["jpeg"] == found["rewards"]["jpeg"] and list(more["rewards"]) == ["jpeg", "contrast"]


def test_the_same_run_as_its_own_baseline_changes_nothing(config, tmp_path):
    first = run_eval(config)
    again = run_eval(replace(config, output_dir=str(tmp_path / "again"), baseline=str(tmp_path / "out/eval.json")))
    assert again["paired_by"] == "prompt and seed" and again["comparisons"] == 2
    for facts in again["rewards"].values():
        assert facts["difference"]["score"] == 0 and not facts["difference"]["counts"]
        assert facts["win_rate"]["rate"] == 0.5 and facts["difference"]["p_holm"] == 1
    page = (tmp_path / "again" / "report.html").read_text()
    assert page.count('alt="baseline"') == page.count('alt="this run"') == 3
    assert (tmp_path / "again" / "grid.png").is_file()
    pictures = str(tmp_path / "out" / "images")
    there = run_eval(replace(config, model=None, images=pictures, output_dir=None, batch_size=5))
    assert [row["seed"] for row in there["images"]] == [row["seed"] for row in first["images"]]
    assert first["trained_on"] is None is there["trained_on"]  # the model is not one of ours
    for name, facts in first["rewards"].items():
        assert there["rewards"][name]["overall"] == pytest.approx(facts["overall"])


def test_the_model_is_gone_before_a_judge_is_loaded(config, monkeypatch):
    opened, alive = drawn.open_pipeline, []

    def watched(*arguments):
        pipe = opened(*arguments)
        alive.append(weakref.ref(pipe.unet))
        return pipe

    load = judged.load
    monkeypatch.setattr(drawn, "open_pipeline", watched)
    monkeypatch.setattr(judged, "load", lambda name: load(name) if alive[0]() is None else pytest.fail("it is there"))
    gc.disable()  # so that it is let go, not found by chance
    try:
        run_eval(replace(config, output_dir=None))
    finally:
        gc.enable()
    assert len(alive) == 1


def test_settings_that_cannot_be_evaluated_are_refused_before_anything_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "open_pipeline", lambda *_: pytest.fail("loaded"))
    (tmp_path / "base.json").write_text(json.dumps({"images": [
        {"prompt": "a cat", "category": "", "seed": 0, "scores": {"jpeg": 1.0}}
    ]}))  # fmt: skip
    for change, said in [
        ({"model": None}, "--model to draw with, or --images"),
        ({"images": "x"}, "one of them"),
        ({"reward": ("jpeg=-1",)}, "leave the weight of 'jpeg' out"),
        ({"reward": ("jpg",)}, "did you mean 'jpeg'"),
        ({"reward": ()}, "the oracle cannot judge .*prompts.txt: .*give --reward"),
        ({"prompts": "shapeval"}, "cannot read the prompts of 'shapeval'"),
        ({"baseline": str(tmp_path / "base.json")}, "has no scores of 'brightness', but of jpeg"),
        ({"output_dir": None, "resume_from_checkpoint": "latest"}, "give the --output_dir"),
        ({"output_dir": str(tmp_path)}, "holds another run"),
    ]:
        with pytest.raises(ValueError, match=said):
            run_eval(replace(config, **change))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ pictures by others


class Chosen:
    """NaN for one of the pictures."""

    differentiable = False

    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        return torch.where(scores > 0.6, torch.nan, scores)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "made").mkdir()
    for i, (gray, text) in enumerate([(50, "dark"), (100, "gray"), (200, "bright"), (90, "gray")]):
        size = (8, 8) if i < 3 else (12, 8)
        Image.new("RGB", size, (gray,) * 3).save(tmp_path / "made" / f"{i}.png")
        (tmp_path / "made" / f"{i}.txt").write_text(text)
    return tmp_path / "made"


def test_a_score_that_is_no_number_names_its_picture_and_loses_none(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "chosen", Entry(Chosen, "", False, False, (0, 1)))
    config = EvalConfig(images=str(folder), reward=("chosen",), output_dir=str(tmp_path / "out"))
    with pytest.raises(RunError, match=r"gives nan to 2.png \('bright'\)"):
        run_eval(config)
    kept = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [line["score"] for line in kept] == pytest.approx([50 / 255, 100 / 255, 90 / 255])
    (folder / "2.png").unlink()
    found = run_eval(replace(config, resume_from_checkpoint="latest"))
    assert [(row["prompt"], row["seed"]) for row in found["images"]] == [("dark", 0), ("gray", 0), ("gray", 1)]
    assert found["rewards"]["chosen"]["overall"]["score"] == pytest.approx((50 + 95) / 2 / 255)
    assert found["trained_on"] is None and "nfe" not in found


def test_a_reference_that_was_exchanged_gives_new_scores(folder, tmp_path):
    """Of a reward that compares with a file: the scores that are kept are those of its bytes."""
    reference, weights = tmp_path / "a.png", checkpoints.alexnet_file(tmp_path)
    reward = (f"lpips[reference={reference}, weights={weights}]",)
    config = EvalConfig(images=str(folder), reward=reward, output_dir=str(tmp_path / "out"))
    means = []
    for colour in ("red", "green", "green"):
        Image.new("RGB", (8, 8), colour).save(reference)
        found = run_eval(replace(config, resume_from_checkpoint="latest" if means else None))["rewards"][reward[0]]
        means.append(found["overall"]["score"])
    assert means[0] != means[1] == means[2]
    kept = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    assert len(kept) == 2 * 4


def test_pictures_without_captions_are_for_rewards_that_read_none(folder):
    (folder / "0.txt").unlink()
    found = run_eval(EvalConfig(images=str(folder), reward=("brightness",)))
    assert found["images"][0]["prompt"] == "0"
    with pytest.raises(UserError, match=r"0.png has no caption"):
        run_eval(EvalConfig(images=str(folder), reward=("tiny-clip",)))


# ------------------------------------------------------------------------------------------------ trained on


def trained_folder(path, **settings):
    path.mkdir()
    save_file({"unet.a": torch.zeros(1)}, path / "pytorch_lora_weights.safetensors")
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    return path


def test_rewards_of_the_runs_that_made_a_lora(tmp_path):
    first = trained_folder(tmp_path / "first", reward=["jpeg=-0.1"], lora=None)
    then = trained_folder(tmp_path / "then", reward=["tiny-clip"], lora=str(first))
    labels = trained_folder(tmp_path / "labels", reward=["tiny-clip"], labels="a.jsonl")
    for model in ("tiny", "some/model"):
        assert rewards_of_model(model, [f"{then}=0.5", str(labels)]) == {"tiny-clip", "jpeg"}
        assert rewards_of_model(model, str(labels)) == frozenset()
    assert rewards_of_model("tiny", None) == frozenset()
    assert rewards_of_model("some/model", None) is None is rewards_of_model(str(tmp_path), [])
    (labels / "config.yaml").unlink()
    assert rewards_of_model("tiny", [str(then), str(labels)]) is None


def test_a_reward_is_known_by_its_name_and_model():
    assert is_trained("tiny-clip", {"smooth[reward=tiny-clip, shifts=2]"})
    assert is_trained("hps-v2.1[dtype=bfloat16]", {"hps-v2.1"})
    assert not is_trained("smooth[reward=jpeg]", {"smooth[reward=tiny-clip]"})
    assert not is_trained("vlm[model=a]", {"vlm[model=b]"})
    assert is_trained("vqascore[model=a]", {"vlm[model=a, question=Is it {prompt}?]"})
    assert is_trained("text-exemplar[encoder=tiny-clip, texts=['a']]", {"smooth[reward=tiny-clip]"})
    towers = "text-exemplar[encoder=clip-score, options={'model': 'a'}]"
    assert is_trained(towers, {"clip-score[model=a]"}) and not is_trained(towers, {"clip-score[model=b]"})
    assert is_trained("pyiqa[metric=niqe]", {"pyiqa[metric=niqe]"})
    assert not is_trained("pyiqa[metric=niqe]", {"pyiqa[metric=musiq]"})


def test_pictures_tell_what_their_model_was_trained_on(folder, tmp_path):
    assert rewards_of_pictures(folder) is None
    lora = trained_folder(tmp_path / "lora", reward=["jpeg"])
    for settings, found in [
        ({"lora": [str(lora)]}, {"jpeg"}), ({"lora": ["gone"]}, None), (3, None), ({}, None),
        ({"lora": None, "model": "tiny"}, frozenset()), ({"lora": None, "model": "a/b"}, None),
    ]:  # fmt: skip
        (folder / "sample.json").write_text(json.dumps({"settings": settings, "images": []}))
        assert rewards_of_pictures(folder) == found


def test_a_baseline_of_another_form_is_one_sentence(tmp_path):
    image = {"prompt": "a", "category": "", "seed": 0, "scores": {"jpeg": 1}}
    for about in ([], {"images": []}, {"images": [3]}, {"images": [image], "trained_on": 5},
                  {"images": [{**image, "scores": {"jpeg": "x"}}]}, {"images": [{**image, "seed": None}]}):  # fmt: skip
        (tmp_path / "base.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="base.json is not an evaluation"):
            read_evaluated(tmp_path / "base.json")


def test_a_long_question_is_no_model_of_the_hub():
    assert revisions(f"judge[url=http://a, model=b/c, template={{prompt}} {'long ' * 200}]") == {}


def test_a_trained_reward_is_marked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "rewards_of_pictures", lambda _: frozenset({"brightness"}))
    config = EvalConfig(images=str(folder), reward=("brightness", "contrast"), output_dir=str(tmp_path / "out"))
    found = run_eval(config)
    assert {name: r["trained_on"] for name, r in found["rewards"].items()} == {"brightness": True, "contrast": False}
    assert ">trained on<" in (page := (tmp_path / "out" / "report.html").read_text()) and page.count("held out") == 1


@pytest.mark.browser
def test_the_report_is_no_wider_than_its_window(folder, tmp_path, browser):
    run_eval(EvalConfig(images=str(folder), reward=("brightness", "jpeg"), output_dir=str(tmp_path / "base")))
    config = EvalConfig(images=str(folder), reward=("brightness", "jpeg"), baseline=str(tmp_path / "base/eval.json"))
    run_eval(replace(config, output_dir=str(tmp_path / "out")))
    for width in (400, 1400):
        page = browser.new_page(viewport={"width": width, "height": 800})
        errors = []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.goto((tmp_path / "out" / "report.html").as_uri())
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width and errors == []
        assert page.locator("#prompts tr").count() == 4 and page.locator("#rewards tr").count() == 3
        page.close()
