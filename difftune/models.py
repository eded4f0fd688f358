"""The embedded models, found by name; any other diffusers model by its folder or its name on the Hub."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from difftune.errors import DiskError, UserError
from guidance.files import whole_folder
from rewards.registry import unknown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

show_bars: ContextVar[bool] = ContextVar("show_bars", default=False)  # also for what is read from the disk
ROOT = Path(__file__).parent.parent  # of the installed packages


@dataclass(frozen=True)
class Model:
    """One embedded model: what it is, and where it lies under the packages' root."""

    folder: str
    summary: str
    base: str | None = None  # the model that lends the parts which the folder lacks
    pipeline: bool = True  # whether `load` makes a diffusers pipeline of it


MODELS: dict[str, Model] = {
    "tiny": Model("difftune/weights/tiny", "a small Stable Diffusion of the world of shapes, 64x64"),
    "tiny-turbo": Model("difftune/weights/tiny-turbo", "tiny, distilled to 1-4 steps", base="tiny"),
    "tiny-flow": Model("difftune/weights/tiny-flow", "tiny's UNet under flow matching", base="tiny"),
    "tiny-weak": Model("difftune/weights/tiny-weak", "a smaller UNet stopped early, for autoguidance", base="tiny"),
    "tiny-clip": Model("rewards/weights/tiny-clip", "an open_clip model: text-image reward", pipeline=False),
    "tiny-classifier": Model(
        "rewards/weights/tiny-classifier", "a CNN over the colour and shape of one object", pipeline=False
    ),
}


def path(name: str) -> Path:
    """The folder of an embedded model. One that shares parts with another is put together in the user's cache
    (`$XDG_CACHE_HOME/difftune`, by default ~/.cache/difftune) the first time.

    Raises ValueError for an unknown name, FileNotFoundError if this installation lacks the weights.
    """
    if name not in MODELS:
        raise UserError(unknown("embedded model", name, MODELS))
    own, base = ROOT / MODELS[name].folder, MODELS[name].base
    if not own.is_dir():
        raise DiskError(
            f"model {name!r} is not in this installation ({own} is missing): reinstall difftune, "
            "or train it with scripts/train_tiny.py"
        )
    return own if base is None else _assembled(name, own, path(base))


def load(name_or_path: str | Path, **options: Any) -> "DiffusionPipeline":
    """A diffusers pipeline in float32: an embedded name, a local folder, or a name on the Hub ("owner/name").

    `options` go to `DiffusionPipeline.from_pretrained`. Raises ValueError, in one sentence, for a name that is none of
    the three, a folder without a pipeline, and a Hub name that cannot be had.
    """
    import torch
    from diffusers import DiffusionPipeline

    where = source(name_or_path)
    dtype = options.pop("torch_dtype", torch.float32)  # the older name of dtype
    options = {"dtype": dtype, "use_safetensors": True} | options
    if isinstance(where, Path):
        check_folder(where)
    try:
        with _without_bars() if isinstance(where, Path) and not show_bars.get() else nullcontext():
            pipe = DiffusionPipeline.from_pretrained(where, **options)
    except Exception as error:  # whatever three libraries raise at a folder or a Hub name that is not as it should be
        why = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(where, Path):
            raise UserError(f"cannot load {str(name_or_path)!r}: {why}") from error
        raise UserError(f"cannot load {where!r} from the Hub: {why}; embedded: {_pipelines()}") from error
    if isinstance(where, Path):
        _check_complete(where, pipe)
        _check_values(where, pipe)
    return pipe


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of the two libraries that read a pipeline's parts."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [module for module in (of_diffusers, of_transformers) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """UserError if the index, or the head of a file of weights, cannot be read, or if weights are pickled or
    quantised. Nothing is loaded: this takes milliseconds."""
    for part in _parts_of(folder):
        if (folder / part).is_dir():
            tensors_of(folder / part)


def _parts_of(folder: Path) -> list[str]:
    """The parts that model_index.json names."""
    index = read_json(folder / "model_index.json")
    for part, kind in index.items():
        if not part.startswith("_") and isinstance(kind, list) and not _names(kind):
            raise UserError(f"{folder}/model_index.json: {part} is {kind}, not the names of a library and a class")
    return [part for part, kind in index.items() if isinstance(kind, list) and not part.startswith("_") and all(kind)]


def _names(kind: list[Any]) -> bool:
    return len(kind) == 2 and (kind == [None, None] or all(isinstance(name, str) for name in kind))


def tensors_of(part: Path) -> dict[str, str]:
    """Names and dtypes of the tensors in a part's folder, by the heads of its safetensors files."""
    files = sorted(file for file in part.glob("*.safetensors") if len(file.name.split(".")) == 2)  # of no variant
    pickled = sorted(p.name for p in part.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled and not files:
        raise UserError(
            f"{part} holds pickled weights alone ({pickled[0]}), which can run code when they are read: load the model "
            "where you trust it, and write it anew by pipe.save_pretrained(folder, safe_serialization=True)"
        )
    found: dict[str, str] = {}
    for file in files:
        found |= _head(file)
    if quantised := [name for name, dtype in found.items() if dtype in ("I8", "U8")]:
        raise UserError(f"{part} is quantised ({quantised[0]} is of 8 bits): give a model in float16 or more")
    return found


def _head(file: Path) -> dict[str, str]:
    """Names and dtypes of a safetensors file, whose length must be what its head says."""
    try:
        with file.open("rb") as data:
            size = int.from_bytes(data.read(8), "little")
            head = json.loads(data.read(min(size, 100 << 20)))
        tensors = {name: about for name, about in head.items() if name != "__metadata__"}
        end = max((about["data_offsets"][1] for about in tensors.values()), default=0)
        if 8 + size + end != file.stat().st_size:
            raise UserError(f"{file} is cut off, or longer than it says: copy it again")
        return {name: about["dtype"] for name, about in tensors.items()}
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not a safetensors file: copy it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a model's file."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object: copy it again")
    return found


def _check_complete(folder: Path, pipe: Any) -> None:
    """UserError for a part whose file has fewer tensors than the part has weights: the rest would be random."""
    for part, module in pipe.components.items():
        if (folder / part).is_dir() and isinstance(vars(type(module)).get("forward"), FunctionType):
            wanted, names = dict(module.named_parameters()), tensors_of(folder / part)
            if len(names) < len(wanted):
                raise UserError(
                    f"{folder / part} holds {len(names)} of {len(wanted)} tensors: without the others it is random"
                )
            _check_named(folder / part, wanted, names)


NUMBERS = {"sample_size": 1, "scaling_factor": 1e-6, "shift_factor": -inf}  # of a config: the least that each may be


def _check_values(folder: Path, pipe: Any) -> None:
    """UserError for a value of a part's files that the part is made with, and that no picture could be drawn with."""
    from diffusers import ConfigMixin

    for part, module in pipe.components.items():
        config = module.config if isinstance(module, ConfigMixin) else {}
        for name in NUMBERS.keys() & config.keys():
            values = config[name] if isinstance(config[name], list | tuple) else [config[name]]
            if not all(value is None or _at_least(value, NUMBERS[name]) for value in values):
                raise UserError(f"{folder / part} has {name}={str(config[name])[:40]}: copy its config.json again")
        if "CLIPTokenizer" in type(module).__name__ and module.model_max_length > 1 << 20:
            raise UserError(f"{folder / part} lacks model_max_length: copy its tokenizer_config.json again")


def _at_least(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and isfinite(value) and value >= least


def _check_named(part: Path, wanted: dict[str, Any], names: Iterable[str]) -> None:
    """UserError for a weight that the files have neither under its name (a prefix may differ) nor under another one:
    libraries rename some as they load them, and leave what they do not find random."""
    ends = {end for name in names for end in _ends(name)}
    lost = [name for name in wanted if not ends & set(_ends(name))]
    spare = {tensor for tensor in names if not set(_ends(tensor)) & {end for name in wanted for end in _ends(name)}}
    for name in lost:
        if wanted[name].is_meta or not _among(wanted[name], part, spare):
            raise UserError(f"{part} has no tensor for {name}, which would be random: copy the model again")


def _ends(name: str) -> list[str]:
    """A name whole, and without its first part or first two, so long as three parts remain."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(3) if i == 0 or len(parts) - i >= 3]


def _among(weight: Any, part: Path, names: Iterable[str]) -> bool:
    """Whether one of these tensors of the files has the weight's values."""
    from safetensors import safe_open

    for file in part.glob("*.safetensors"):
        with safe_open(file, "pt") as data:
            for name in set(names) & set(data.keys()):
                value = data.get_tensor(name)
                if value.numel() == weight.numel() and bool((value.flatten().to(weight) == weight.flatten()).all()):
                    return True
    return False


def source(name_or_path: str | Path) -> Path | str:
    """Where a pipeline's weights are: the folder, or the Hub name as it is; ValueError for anything else."""
    name, folder = str(name_or_path), _expanded(name_or_path)
    if name in MODELS and not MODELS[name].pipeline:
        raise UserError(f"{name!r} is {MODELS[name].summary}, not a pipeline; embedded pipelines: {_pipelines()}")
    if name in MODELS:
        return path(name)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"{name!r} is not a pipeline: it holds no model_index.json")
    if isinstance(name_or_path, str) and name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        return name
    raise UserError(
        f"{unknown('model', name, [n for n in MODELS if MODELS[n].pipeline])}, "
        "a folder with a model_index.json, or owner/name on the Hub"
    )


def check_model(name: str) -> None:
    """UserError unless a pipeline of that name can be looked for; nothing is loaded, and the Hub is not asked."""
    source(name)


def _expanded(folder: str | Path) -> Path:
    """The folder with ~ or ~NAME replaced by the home folder; unchanged if there is no such home."""
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        return Path(folder)


def scheduler_of(name_or_path: str | Path) -> Any:
    """The scheduler of a model in a folder; None for one on the Hub, which is not asked for it."""
    import diffusers

    where = source(name_or_path)
    if not isinstance(where, Path):
        return None
    kind = read_json(where / "model_index.json").get("scheduler")
    try:
        return getattr(diffusers, kind[1]).from_pretrained(where, subfolder="scheduler")  # type: ignore[index]
    except Exception as error:  # whatever diffusers raises at a file that is not as it should be
        why = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load the scheduler of {str(name_or_path)!r}: {why}") from error


def _pipelines() -> str:
    return ", ".join(name for name, model in MODELS.items() if model.pipeline)


def _assembled(name: str, own: Path, base: Path) -> Path:
    """The base's folder with `own`'s parts in place of its own, in the cache, under a name that is their contents'."""
    cache = cache_folder()
    done = cache / f"{name}-{_digest(base, own)}"
    if done.is_dir():
        return done
    try:
        with whole_folder(done, replace=False) as partial:
            _merge(base, own, partial)
    except OSError as error:
        why, remedy = error.strerror or str(error), "set XDG_CACHE_HOME to a folder that can be written"
        raise DiskError(f"cannot write to {cache} ({' '.join(why.split())}): {remedy}") from error
    return done


def cache_folder() -> Path:
    """Where parts of models are put together. DiskError where there is no home folder and no XDG_CACHE_HOME."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "difftune"
    except RuntimeError as error:  # no HOME, and no entry of this user among the system's
        raise DiskError("there is no home folder: set XDG_CACHE_HOME to a folder that can be written") from error


def _digest(*folders: Path) -> str:
    """16 hex digits of the names and the contents of all files."""
    sha = hashlib.sha256()
    for folder in folders:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            sha.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()[:16]


def _merge(base: Path, own: Path, target: Path) -> None:
    """Copies base, replaces the parts that `own` has, and names their classes in model_index.json."""
    shutil.copytree(base, target, dirs_exist_ok=True)
    index = json.loads((target / "model_index.json").read_text())
    for part in (part for part in sorted(own.iterdir()) if part.is_dir()):
        shutil.rmtree(target / part.name, ignore_errors=True)
        shutil.copytree(part, target / part.name)
        index[part.name] = ["diffusers", _class_name(part)]
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _class_name(part: Path) -> str:
    file = "scheduler_config.json" if part.name == "scheduler" else "config.json"
    return json.loads((part / file).read_text())["_class_name"]
