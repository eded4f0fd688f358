"""Downloaded weights: what `lock.json` pins, hashed, never unpickled, and kept so that no network is needed again."""

import hashlib
import inspect
import json
import os
import pickle
import re
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rewards.errors import NotFetched, RewardError, Unreachable, WeightsMissing
from rewards.registry import OF_ALL, REWARDS, entry, fitting, imported, spelled, unknown

LOCKS = Path(__file__).parent / "lock.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SAFE = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]  # never a pickle
SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Lock:
    """One pinned file. `evidence` says how far its hash is known: "hashed" by us from the file itself, "reported" by
    others who hashed theirs, or "none": then the hash of the first download is kept, and later ones must have it."""

    name: str
    file: str
    revision: str
    evidence: str
    sha256: str | None = None
    bytes: int | None = None
    hub_id: str | None = None
    url: str | None = None  # of a file that is not on the Hub


@cache
def locks() -> Mapping[str, Lock]:
    """Every pinned file by its name."""
    return {name: Lock(name=name, **facts) for name, facts in json.loads(LOCKS.read_text()).items()}


def weights(name: str) -> Path:
    """The file of that name in `lock.json`, downloaded once, verified now; a pickle comes as safetensors.

    Raises ValueError for a file whose hash is not what it must be, and an OSError if it was never fetched and
    cannot be now.
    """
    if name not in locks():
        raise RewardError(unknown("pinned file", name, locks()))
    lock, record = locks()[name], _folder(name) / "record.json"
    if not record.is_file() or json.loads(record.read_text())["revision"] != lock.revision:
        _install(lock, record)
    kept = json.loads(record.read_text())
    if kept["source_sha256"] != (lock.sha256 or kept["source_sha256"]):
        raise RewardError(_tampered(lock, record.parent, kept["source_sha256"]))
    file = Path(kept["file"])
    if not file.is_file():
        raise WeightsMissing(f"{file} is gone: remove {record.parent} to fetch {name} again")
    found = sha256(file)
    if found != kept["sha256"]:
        raise RewardError(_tampered(lock, file, found))
    return file


def fetched(name: str) -> bool:
    """Whether a file of `lock.json` was fetched already; it is not hashed."""
    record = _folder(name) / "record.json"
    if not record.is_file():
        return False
    kept = json.loads(record.read_text())
    return kept["revision"] == locks()[name].revision and Path(kept["file"]).is_file()


def state(name: str) -> dict[str, Tensor]:
    """The tensors of `weights(name)`, on the CPU."""
    return read(weights(name))


def read(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle of tensors, which may lie under "state_dict".

    A pickle is read with `weights_only=True`, which runs no code. Raises ValueError if it holds anything else or is not
    whole, and FileNotFoundError if there is none.
    """
    if not Path(file).is_file():
        raise WeightsMissing(f"there are no weights at {file}")
    try:
        if Path(file).suffix not in PICKLES:
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RewardError(f"{file} holds more than tensors, and is not unpickled") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise RewardError(f"{file} is not a whole file of weights: {_first_line(error)}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise RewardError(f"{file} does not hold tensors by name")
    return found


def prefetch(reward: str, **options: Any) -> list[Path]:
    """Fetches and verifies all that a reward downloads under these options; then it loads without a network.

    Options may stand in the name, as for `rewards.registry.load`, which raises the same for them.
    """
    about, arguments = entry(spelled(reward)[0]), _arguments(reward, options)
    return imported(about.fetch)(**arguments) if about.fetch else [weights(name) for name in about.weights]


def _arguments(reward: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that a reward is made with: the options, those in its name, and the defaults."""
    plain, written = spelled(reward)
    make = imported(entry(plain).make)
    own = {option: value for option, value in {**written, **options}.items() if option not in OF_ALL}
    given = inspect.signature(make).bind(**fitting(plain, make, own))
    given.apply_defaults()
    return given.arguments


def revisions(reward: str, **options: Any) -> dict[str, str]:
    """What a reward is made of, so far as it is known: the pinned revision of each file, the commit of each model of
    the Hub that was fetched, the hash of each file that its options name, such as a reference picture, unless it is
    large; and that of a reward that it is made of."""
    about, arguments = entry(spelled(reward)[0]), _arguments(reward, options)
    pinned = [] if about.wraps else [name for name in about.weights if not _replaced(name, arguments)]
    found = {name: locks()[name].revision for name in pinned}
    texts = [value for value in arguments.values() if isinstance(value, str)]
    named = imported(about.models)(**arguments) if about.models else []
    for text in [*named, *texts]:
        record = _record(text) if _may_be_of_the_hub(text) else None
        if record is not None and record.is_file():
            found[text] = json.loads(record.read_text())["revision"]
        elif _is_small_file(text):
            found[text] = sha256(Path(text))
    inner = arguments.get("reward", arguments.get("encoder"))
    if isinstance(inner, str) and spelled(inner)[0] in REWARDS:
        found |= revisions(inner, **(arguments.get("options") or {}))
    return found


def _replaced(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a reward takes what its options name in place of a pinned file."""
    options = ("vocabulary",) if name.endswith("-vocabulary") else ("weights", "model")
    return any(arguments.get(option) is not None for option in options)


def _is_small_file(text: str) -> bool:
    """Whether a text names a file that is hashed in no time."""
    with suppress(OSError, ValueError):  # a question is no name of a file
        return Path(text).is_file() and Path(text).stat().st_size <= 2**26
    return False


def _may_be_of_the_hub(text: str) -> bool:
    """Whether a text is spelled as a model of the Hub, "owner/name", and not as a question or a path."""
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", text) is not None


def _record(model: str | Path) -> Path:
    """Where the commit of a model of the Hub is written down."""
    return _folder("models") / f"{str(model).replace('/', '--')}@main.json"


def fetch_model(model: str | Path, **_: Any) -> list[Path]:
    """What a reward downloads that takes any model of the Hub."""
    return [snapshot(model)]


def snapshot(model: str | Path, weights: bool = True) -> Path:
    """The folder of a model on the Hub, without its pickles; a folder is itself. Not `weights`: its small files alone.

    The first download pins the commit, so that the model does not change under a later run. Raises FileNotFoundError
    if there is no such model, none with safetensors, or no network to fetch it.
    """
    if Path(model).is_dir():
        return _safe(Path(model)) if weights else Path(model)
    record = _record(model)
    pinned = json.loads(record.read_text())["revision"] if record.is_file() else None
    try:
        wanted = SAFE if weights else SMALL
        folder = Path(huggingface_hub.snapshot_download(str(model), revision=pinned, allow_patterns=wanted))
        folder = _safe(folder) if weights else folder
    except LocalEntryNotFoundError as error:
        raise NotFetched(_unreached(str(model))) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise WeightsMissing(f"{model} is neither a folder nor a model of the Hub: {_first_line(error)}") from error
    _write(record, json.dumps({"revision": folder.name}).encode())
    return folder


def _safe(folder: Path) -> Path:
    if not any(folder.glob("*.safetensors")):
        raise WeightsMissing(
            f"{folder} has no safetensors, and pickles of models are not read: name another model, or a folder of your "
            "own conversion, as transformers' AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER) writes"
        )
    return folder


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _install(lock: Lock, record: Path) -> None:
    """Downloads, hashes, converts a pickle, and writes down what there is."""
    source = _from_hub(lock) if lock.hub_id else _from_url(lock, record.parent / lock.file)
    found = sha256(source)
    if not found.startswith(lock.sha256 or _stated(source) or found):
        raise RewardError(_tampered(lock, source, found))
    file = _converted(source, record.parent / "model.safetensors") if source.suffix in PICKLES else source
    facts = {"source_sha256": found, "file": str(file), "sha256": sha256(file), "revision": lock.revision}
    _write(record, json.dumps(facts).encode())


def _from_hub(lock: Lock) -> Path:
    assert lock.hub_id
    return _downloaded(lock.hub_id, lock.file, lock.revision)


def data_file(data_set: str, file: str, revision: str) -> Path:
    """A file of a data set on the Hub, fetched once. Raises an OSError, in one sentence, if it cannot be had."""
    return _downloaded(data_set, file, revision, repo_type="dataset")


def _downloaded(repository: str, file: str, revision: str, **kind: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, **kind))
    except LocalEntryNotFoundError as error:
        raise NotFetched(_unreached(f"{repository}/{file}")) from error
    except HfHubHTTPError as error:
        raise Unreachable(f"the Hub does not give {repository}/{file}: {_first_line(error)}") from error


def _from_url(lock: Lock, file: Path) -> Path:
    assert lock.url and lock.bytes, f"{lock.name} in lock.json needs url and bytes"
    if constants.HF_HUB_OFFLINE:
        raise NotFetched(_unreached(lock.file))
    try:
        with urllib.request.urlopen(lock.url, timeout=TIMEOUT) as answer:
            content = answer.read(lock.bytes + 1)
    except OSError as error:
        raise Unreachable(f"cannot fetch {lock.url}: {_first_line(error)}") from error
    return _write(file, content)


def _stated(file: Path) -> str | None:
    """The hash that the Hub states of a large file, the name of its blob in the cache; or the first 8 digits, which
    torchvision puts into a file's name."""
    blob = file.resolve().name
    begins = re.search(r"-([0-9a-f]{8})\.pth$", blob)
    return blob if len(blob) == 64 else begins and begins[1]


def _converted(source: Path, file: Path) -> Path:
    tensors = {key: value.contiguous().clone() for key, value in read(source).items()}
    return _write(file, save(tensors))


def _write(file: Path, data: bytes) -> Path:
    """A whole file, or none. WeightsMissing where the disk takes none."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        return partial.replace(file)
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder that can be written"
        raise WeightsMissing(f"cannot write {file}: {error.strerror}; {remedy}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _folder(name: str) -> Path:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:  # no HOME, and no entry of this user among the system's
        raise WeightsMissing("there is no home folder: set XDG_CACHE_HOME to a folder that can be written") from error
    return base / "difftune" / "rewards" / name


def _tampered(lock: Lock, file: Path, found: str) -> str:
    wanted = lock.sha256 or "that of its first download"
    return f"{file} is not the file {lock.name!r} that was pinned: sha256 {found}, wanted {wanted}; remove it"


def _unreached(what: str) -> str:
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    return f"{what} is not in the cache and {why}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
