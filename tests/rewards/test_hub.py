"""Downloads: pinned, hashed, converted once, refused when tampered with, and none when offline."""

import json
import os
import pickle
import socket
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from rewards import hub, registry
from rewards.hub import Lock
from rewards.registry import REWARDS

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A Hub of one repository, in a folder; counts its downloads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.save(
        {
            "state_dict": TENSORS,
        },
        folder / "model.pt",
    )
    save_file(TENSORS, folder / "model.safetensors")
    calls = []

    def download(repository, file, revision):
        calls.append((repository, file, revision))
        return str(folder / file)

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", download)
    return folder, calls


def lock(monkeypatch, file: str, sha256: str | None = None, **facts) -> None:
    pinned = Lock("it", file, "abc", "reported" if sha256 else "none", sha256, hub_id="some/one", **facts)
    monkeypatch.setattr(hub, "locks", lambda: {"it": pinned})


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("known", [True, False])
def test_download_is_pinned_hashed_and_made_once(store, monkeypatch, file, known):
    folder, calls = store
    lock(monkeypatch, file, hub.sha256(folder / file) if known else None)
    for _ in range(2):
        path = hub.weights("it")
        assert path.suffix == ".safetensors"
        assert all(torch.equal(load_file(path)[key], value) for key, value in TENSORS.items())
    assert calls == [("some/one", file, "abc")]
    record = json.loads((path.parents[1] / "it" / "record.json").read_text()) if file == "model.pt" else None
    assert record is None or record["source_sha256"] == hub.sha256(folder / file)


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_file_that_is_not_the_pinned_one_is_refused(store, monkeypatch, file):
    lock(monkeypatch, file, "0" * 64)
    with pytest.raises(
        ValueError, match=r"is not the file 'it' that was pinned: sha256 \w{64}, wanted 0{64}; remove it"
    ):
        hub.weights("it")
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "difftune" / "rewards" / "it" / "model.safetensors").exists()


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_kept_file_that_was_tampered_with_is_refused(store, monkeypatch, file):
    folder, _ = store
    lock(monkeypatch, file, hub.sha256(folder / file))
    path = hub.weights("it")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file 'it' that was pinned"):
        hub.weights("it")


def test_file_without_a_known_hash_must_have_the_hash_that_the_hub_states(store, monkeypatch):
    folder, _ = store
    blob = folder / ("0" * 64)
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    lock(monkeypatch, "model.safetensors")
    with pytest.raises(ValueError, match="is not the file 'it' that was pinned"):
        hub.weights("it")


def test_pickle_that_runs_code_is_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": Evil()}, tmp_path / "zipped.pt")
    for file in ("evil.pt", "zipped.pt"):
        with pytest.raises(ValueError, match="holds more than tensors, and is not unpickled"):
            hub.read(tmp_path / file)
    assert not (tmp_path / "owned").exists()


def test_pickle_of_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        hub.read(tmp_path / "list.pt")
    for name in ("half.pt", "half.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "list.pt").read_bytes()[:100])
        with pytest.raises(ValueError, match=f"{name} is not a whole file of weights|holds more than tensors"):
            hub.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*none.pt"):
        hub.read(tmp_path / "none.pt")


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Every socket that would leave this process raises."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise AssertionError("a network call")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.mark.parametrize("name", hub.locks())
def test_nothing_is_asked_of_the_network_when_offline(no_network, name):
    """Whether from the Hub or from a URL."""
    with pytest.raises(FileNotFoundError, match=r"is not in the cache and HF_HUB_OFFLINE is set"):
        hub.weights(name)
    assert no_network == []


def test_what_is_to_be_fetched_is_named(no_network):
    with pytest.raises(FileNotFoundError, match=r"reward 'pickscore': .*; run `difftune rewards prefetch pickscore`"):
        registry.load("pickscore")
    with pytest.raises(FileNotFoundError, match=r"run `difftune rewards prefetch 'vlm\[model=some/model\]'`"):
        registry.load("vlm[model=some/model]")
    assert no_network == []


def test_model_of_the_hub_is_not_asked_for_when_offline(no_network):
    with pytest.raises(FileNotFoundError, match="some/model is not in the cache and HF_HUB_OFFLINE is set"):
        hub.snapshot("some/model")
    assert no_network == []


def test_what_was_fetched_loads_offline(store, no_network, monkeypatch):
    folder, _ = store
    lock(monkeypatch, "model.pt", hub.sha256(folder / "model.pt"))
    hub.weights("it")
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", None)
    assert set(hub.state("it")) == set(TENSORS)
    assert no_network == []


def test_model_of_the_hub_stays_at_the_commit_of_its_first_download(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def download(model, revision, allow_patterns):
        asked.append(revision)
        (tmp_path / "snapshots" / "a1b2").mkdir(parents=True, exist_ok=True)
        save_file(TENSORS, tmp_path / "snapshots" / "a1b2" / "model.safetensors")
        assert not any(pattern.endswith((".bin", ".pt", ".pth", ".ckpt")) for pattern in allow_patterns)
        return str(tmp_path / "snapshots" / "a1b2")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert hub.snapshot("some/model") == hub.snapshot("some/model")
    assert asked == [None, "a1b2"]
    assert hub.snapshot(tmp_path / "snapshots" / "a1b2") == tmp_path / "snapshots" / "a1b2"
    with pytest.raises(
        FileNotFoundError, match=r"has no safetensors, and pickles of models are not read: .*save_pretrained\(FOLDER\)"
    ):
        hub.snapshot(tmp_path)


@pytest.mark.parametrize(
    ("reward", "models"),
    [
        ("hps-v3", ["MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"]),
        ("hps-v3[weights=a.safetensors]", ["Qwen/Qwen2-VL-7B-Instruct"]),
        ("cyclereward[pairs=T2I]", ["carolineec/CycleReward-T2I"]),
        ("clip", ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        ("open-clip[model=ViT-B-32, pretrained=laion2b_s34b_b79k]", ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]),
        ("clip-score[model=some/one]", ["some/one"]),
        ("smooth[reward=clip-score[model=some/one]]", ["some/one"]),
        ("smooth[reward=clip]", ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        ("smooth[reward=vlm[model=some/one]]", ["some/one"]),
        (
            "text-exemplar[encoder=open-clip, options={'model': 'ViT-B-32', 'pretrained': 'laion2b_s34b_b79k'}]",
            ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"],
        ),
    ],
)
def test_revisions_are_the_commits_that_were_fetched(reward, models, tmp_path, monkeypatch):
    """Of the models that a reward names by itself, and of the reward that it is made of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for model in (*models, "another/model"):
        record = hub._record(model)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"revision": f"commit of {model}"}))
    pinned = {"bert-vocabulary": hub.locks()["bert-vocabulary"].revision} if "cycle" in reward else {}
    assert "imagereward-v1" in hub.revisions("imagereward")
    assert hub.revisions("imagereward[weights=a.pt, vocabulary=b.txt]") == {}
    assert hub.revisions(reward) == {model: f"commit of {model}" for model in models} | pinned


def test_hub_that_does_not_answer_is_not_called_offline(tmp_path, monkeypatch):
    """Without HF_HUB_OFFLINE, the sentence says what happened: no network, a URL without one, no such model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no network")

    def refuse(*_, **__):
        raise URLError("no address")

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub.urllib.request, "urlopen", refuse)
    for fetch in (lambda: hub.weights("pickscore-v1"), lambda: hub.snapshot("some/model")):
        with pytest.raises(FileNotFoundError, match="is not in the cache and the Hub cannot be reached"):
            fetch()
    with pytest.raises(ConnectionError, match=r"cannot fetch https://raw.githubusercontent.com/.*: .*no address"):
        hub.weights("aesthetic-v2-sac")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="/no/such/folder is neither a folder nor a model of the Hub: "):
        hub.snapshot("/no/such/folder")


def test_file_of_another_revision_is_fetched_again(store, monkeypatch):
    folder, calls = store
    lock(monkeypatch, "model.safetensors")
    hub.weights("it")
    save_file({"a.bias": torch.zeros(2)}, folder / "model.safetensors")
    newer = Lock("it", "model.safetensors", "def", "none", hub_id="some/one")
    monkeypatch.setattr(hub, "locks", lambda: {"it": newer})
    assert set(hub.state("it")) == {"a.bias"}
    assert [revision for *_, revision in calls] == ["abc", "def"]


PREFETCHED = {  # a name with its options, and what is fetched
    "pickscore": ["pickscore-v1"],
    "clip-score": ["clip-vit-l-14"],
    "clip-score[model=some/clip]": ["some/clip"],
    "clip": ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"],
    "open-clip": ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"],
    "vlm[model=some/vlm, dtype=bfloat16]": ["some/vlm"],
    "classifier[model=some/classifier]": ["some/classifier"],
    "text-exemplar[texts=['a'], encoder=hps-v2]": ["hps-v2"],
    "text-exemplar[texts=['a'], encoder=open-clip]": ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"],
    "hps-v2.1[batch_size=4, dtype=bfloat16]": ["hps-v2.1"],
    "tiny-clip": [],
}


@pytest.mark.parametrize("name", PREFETCHED)
def test_prefetch_fetches_what_the_options_name(name, monkeypatch):
    monkeypatch.setattr(hub, "weights", lambda name: name)
    monkeypatch.setattr(hub, "snapshot", lambda model: model)
    assert hub.prefetch(name) == PREFETCHED[name]


def test_prefetch_of_any_model_needs_one():
    with pytest.raises(ValueError, match=r"reward 'vlm' needs the option 'model': write vlm\[model=...\]"):
        hub.prefetch("vlm")
    with pytest.raises(ValueError, match="no option of reward 'jpeg' 'model'"):
        hub.prefetch("jpeg", model="some/model")


def test_every_reward_that_downloads_can_be_prefetched():
    """What names no pinned file and has no `fetch` is computed, embedded, or a server's."""
    computed = {name for name, entry in REWARDS.items() if not entry.weights and entry.fetch is None}
    assert {name for name in computed if (REWARDS[name].memory_mb or 0) > 40} == set()
    assert computed & {"clip", "open-clip", "classifier", "vlm", "text-exemplar"} == set()


def test_lock_table_says_what_it_does_not_know():
    """A hash or the word "none"; every file is of some reward or what a bundled head was made of, and every reward's
    file is there."""
    for pinned in hub.locks().values():
        assert (pinned.sha256 is None) == (pinned.evidence == "none")
        assert pinned.evidence in ("hashed", "reported", "none")
        assert pinned.sha256 is None or len(pinned.sha256) == 64
        assert len(pinned.revision) == 40 or pinned.file.endswith(f"-{pinned.revision}.pth")  # torchvision's
        assert (pinned.url is None) != (pinned.hub_id is None)
    made_of = {"aesthetic-v2-sac", "aesthetic-v2-ava"}  # by scripts/make_aesthetic.py
    assert {name for entry in REWARDS.values() for name in entry.weights} | made_of == set(hub.locks())
    with pytest.raises(ValueError, match=r"no pinned file 'hps-v21' \(did you mean 'hps-v2.1'\?\)"):
        hub.weights("hps-v21")
