"""Commands that must be refused, drawn by a seed: a wrong word, number, file or folder in a command that is right."""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from hashlib import sha256
from math import inf, isfinite
from pathlib import Path
from typing import Any, get_type_hints

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from difftune.cli.command import Number
from difftune.cli.program import cli
from difftune.reno.named import OPTIMIZERS
from guidance.methods.catalogue import GUIDANCE
from guidance.search.catalogue import SEARCHES
from rewards.errors import Unreachable
from rewards.simple import Brightness
from solvers.ranges import Range, range_of
from tests.support.pipelines import sd

LONGER = {  # what is done in more than one step
    "train alignprop": ["--train_batch_size", "1", "--prompts", "animals"],
    "optimize": ["--iterations", "4", "--checkpointing_steps", "1"],
}
NOT_NUMBERS = ("x", "", "1;2", "0x1g", "nan", "1e999", "-inf", "9" * 5000, "--", "1 2", "½", "1.5.2", "[1]")
NO_TEXTS = ("a\0b", "\ud800", "x\udcffy")
SEVERAL = "guidance: [cfg, apg]"
YAMLS = (
    "[",
    "]",
    "a: [",
    "[" * 3000,
    "{" * 3000,
    "a: " + "[" * 3000 + "]" * 3000,
    "- 1",
    "text",
    "7",
    "2020-01-01",
    "",
    "null",
    "? [a, b]\n: 1",
    "1: 2",
    "seed: 2020-01-01",
    "seed: 2020-13-45",
    "seed: !!timestamp x",
    "seed: !!int x",
    "seed: !!python/object:os.system x",
    "seed: !!binary x",
    "seed: !mine 3",
    "seed: " + "9" * 5000,
    "seed: [1, 2]",
    "seed: {a: 1}",
    "seed: 1.5",
    "seed: .nan",
    "seed: 1\nseed: 2",
    "seed: &a [*a]",
    "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]",
    "a: &a [" + "x," * 9 + "]\n" + "\n".join(f"k{i}: &k{i} [{'*a,' * 9}]" for i in range(9)),
    "<<: {seed: 1}",
    "seed: 1\n\tseed: 2",
    "seed: 'a",
    'seed: "\\0"',
    'prompt: "\\ud800"',
    "seed: |\n  1\n 2",
    "sede: 1",
    "config: other.yaml",
    "guidance_options: [a]",
    "guidance_options: 3",
    "guidance_options: {scale: [1, 2]}",
    "guidance.scale: {a: 1}",
    "guidance.scale: high",
    "guidance.scal: 1",
    SEVERAL,
    "guidance: {cfg: 1}",
    "model: [tiny]",
    "num_inference_steps: 3\nsteps: 4",
    "%YAML 9.9\n---\nseed: 1",
    "---\nseed: 1\n---\nseed: 2",
    "\x07",
)
REWARDS = (
    "", "=", "=1", "jpeg=nan", "jpeg=inf", "jpeg=", "jpeg=1=2", "jpeg[", "jpeg]", "jpeg[quality", "jpeg[quality]",
    "jpeg[qualty=3]", "jpge", "os:system:x", ":", "nowhere:f", "os:nothing", "json:__name__", "a b",
    "http://", "https://",
    "http://[", "http://a b", "http://127.0.0.1:99999", "tiny-clip[x=" + "[" * 500 + "]", "classifier",
    "vlm", "ocr[a=]",
    "jpeg[quality=40]x", "remote", "text-exemplar", "tiny-clip=1e999", "./x:f", "..:f", "1:2", "x" * 5000,
)  # fmt: skip
OPTIMISERS = (
    "lbfgs[history=0]", "lbfgs[history=-1]", "sgd[momentum=nan]", "sgd[momentum=x]", "adam[beta1=2]", "adam[beta1]",
    "adam[epsilon=-1]", "spsa[candidates=3]", "cma[candidates=2]", "neighbours[candidates=0]", "neighbours[cosine=2]",
    "sgdd", "", "sgd[", "[]", "adam[learning_rate=inf]", "spsa[radius=0]", "lbfgs[max_step=nan]", "sgd[grad_clip=-1]",
    "adam[beta2='a']", "cma[sigma=0]", "adam[beta1=None]", "sgd[momentum=[1]]",
)  # fmt: skip
FOLDERS = (
    "",
    "FILE",
    "FILE/under",
    "FULL",
    "/proc/difftune/out",
    "/dev/null/out",
    "x" * 300,
    "a/" * 3000,
    "a\0b",
    "\ud800",
)


@dataclass(frozen=True)
class Case:
    """A command line that must be refused, in a folder of its own."""

    kind: str
    words: list[str]
    loads: bool = False  # the fault is in what is loaded
    may_run: bool = False  # the fault may be of no account, and the work begun

    def __str__(self) -> str:
        shown = [word if len(word) < 60 else f"{word[:40]}...({len(word)})" for word in self.words]
        return f"{self.kind}: {shown!r}"


class Fuzzer:
    """Draws cases by a seed; `root` gets the models, the pictures and the files that they name."""

    def __init__(self, root: Path, seed: int):
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.draw = root, random.Random(seed)
        self.model, self.picture = root / "model", root / "picture.png"
        sd().save_pretrained(self.model)
        Image.fromarray(np.full((16, 16, 3), 51, np.uint8)).save(self.picture)
        self.file, self.full = root / "file", root / "full"
        self.file.write_text("precious")
        self.full.mkdir()
        (self.full / "grid.png").write_text("precious")
        self.bases = dict(self._bases())
        self.commands = dict(_commands())
        self.number = 0
        self.runs: dict[str, Path] = {}  # folders of runs that can be gone on from, by their commands

    def cases(self, count: int) -> Iterator[Case]:
        """So many cases, all kinds alike, except fewer resumed runs, which take longer."""
        kinds: list[Callable[[], Case]] = [
            self.numbers, self.choices, self.texts, self.yaml, self.folders, self.rewards, self.guidance, self.settings,
            self.optimizers, self.flags, self.models, self.loras, self.pictures, self.files,
        ]  # fmt: skip
        for i in range(count):
            yield self.checkpoints() if self.runs and i % 40 == 39 else kinds[i % len(kinds)]()

    def _bases(self) -> Iterator[tuple[str, list[str]]]:
        model = ["--model", str(self.model), "--num_inference_steps", "2"]
        yield "sample", ["sample", *model, "--prompt", "red", "--output_dir", "OUT"]
        yield "eval", ["eval", *model, "--prompts_per_category", "1", "--images_per_prompt", "1"]
        yield "compare", ["compare", *model, "--prompt", "red", "--num_images", "1", "--output_dir", "OUT"]
        yield "score", ["score", "--reward", "brightness", "--", str(self.picture)]
        short = [*model, "--reward", "brightness", "--output_dir", "OUT"]
        yield "optimize", ["optimize", *short, "--prompt", "red", "--iterations", "2"]
        yield "search", ["search", "best-of-n", *short, "--prompt", "red", "--nfe_budget", "20"]
        for name in cli.commands["train"].commands:  # type: ignore[attr-defined]
            steps = ["--model", str(self.model), "--num_inference_steps", "4"]
            yield f"train {name}", ["train", name, *steps, "--reward", "brightness", "--output_dir", "OUT"]
        yield "label", ["label", "--images", str(self.full)]
        yield "demo", ["demo", "--output_dir", "OUT"]
        yield "rewards serve", ["rewards", "serve", "brightness"]

    def _with(self, name: str, *words: str) -> list[str]:
        """A command with further flags in place of those that it has."""
        base = list(self.bases[name])
        for flag in {word.partition("=")[0] for word in words} & set(base):
            first = base.index(flag)
            del base[first : first + 2]
        cut = base.index("--") if "--" in base else len(base)
        return [*base[:cut], *words, *base[cut:]]

    def _one(self, *names: str) -> str:
        return self.draw.choice([name for name in self.bases if not names or name.split(" ")[0] in names])

    def path(self, ending: str = "") -> Path:
        self.number += 1
        return self.root / f"input{self.number}{ending}"

    def make_runs(self) -> None:
        """A training after its only step, and an optimisation whose reward fails in the third iteration."""
        self.runs = {name: self.root / name.replace(" ", "-") for name in LONGER}
        call, calls = Brightness.__call__, []

        def failing(reward: Brightness, images: Tensor, prompts: Sequence[str]) -> Tensor:
            calls.append(images)
            if len(calls) > 2:
                raise Unreachable("no scores")
            return call(reward, images, prompts)

        with pytest.MonkeyPatch.context() as patch:
            for name, folder in self.runs.items():
                done = CliRunner().invoke(cli, self._longer(name, 1, folder))
                assert any(folder.rglob("state.json")), done.stderr
                patch.setattr(Brightness, "__call__", failing)

    def _longer(self, name: str, steps: int, folder: Path, *words: str) -> list[str]:
        """The command of a run that can be gone on from."""
        more = [*LONGER[name], "--max_train_steps", str(steps)] if name.startswith("train") else LONGER[name]
        return self._with(name, *more, "--output_dir", str(folder), *words)

    # ---- what is drawn

    def numbers(self) -> Case:
        while True:
            name = self._one()
            options = [p for p in self.commands[name].params if isinstance(p.type, Number)]
            if options:
                option = self.draw.choice(options)
                return Case("number", self._with(name, f"{option.opts[0]}={self.wrong(option.type.within)}"))

    def wrong(self, within: Range) -> str:
        """A text that is not a number of the range."""
        if self.draw.random() < 0.5:
            return self.draw.choice([x for x in NOT_NUMBERS if not _reads(x, within)])
        low = [within.low - 1, within.low - 1e9] if isfinite(within.low) else [-inf]
        high = [within.high * 2 + 1, within.high * 1000 + 1] if isfinite(within.high) else [inf]
        outside = [x for x in [*low, *high, within.low, within.high, 0.5, inf, -inf] if not _reads(str(x), within)]
        return str(self.draw.choice(outside))

    def choices(self) -> Case:
        name = self._one("train", "optimize")
        option = self.draw.choice([p for p in self.commands[name].params if isinstance(p.type, click.Choice)])
        return Case(
            "choice", self._with(name, f"{option.opts[0]}={self.draw.choice(('', 'x', 'None', '7', 'NO', 'a,b'))}")
        )

    def texts(self) -> Case:
        name = self._one()
        options = [
            p for p in self.commands[name].params if isinstance(p, click.Option) and not p.is_flag and p.expose_value
        ]
        option = self.draw.choice(options)
        return Case("text", self._with(name, f"{option.opts[0]}={self.draw.choice(NO_TEXTS)}"))

    def yaml(self) -> Case:
        name, path = self._one("sample", "compare", "train", "optimize", "search"), self.path(".yaml")
        text = self.draw.choice([text for text in YAMLS if (name, text) != ("compare", SEVERAL)])  # which it compares
        path.write_text(text + ("\n" if self.draw.random() < 0.5 else "\r\n"), "utf-8")
        return Case(
            "yaml " + text[:30], self._with(name, "--config", str(path)) + (["--sede"] if text in ("", "null") else [])
        )

    def folders(self) -> Case:
        name = self._one("sample", "compare", "train", "optimize", "search")
        chosen = {"FILE": str(self.file), "FILE/under": str(self.file / "under"), "FULL": str(self.full)}
        folder = self.draw.choice(FOLDERS)
        return Case("output_dir", self._with(name, "--output_dir", chosen.get(folder, folder)))

    def rewards(self) -> Case:
        name = self._one("score", "train", "optimize", "search", "compare")
        return Case("reward", self._with(name, f"--reward={self.draw.choice(REWARDS)}"))

    def guidance(self) -> Case:
        method = self.draw.choice(list(GUIDANCE))
        kind = GUIDANCE[method]
        hints = get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {}
        numbers = {f.name: r for f in fields(kind) if (r := range_of(hints[f.name]))} if is_dataclass(kind) else {}
        name = self._one("sample", "train", "optimize", "search", "eval")
        if not numbers or self.draw.random() < 0.3:
            wrong = self.draw.choice(
                ("cgf", "", ":", "cfg:cfg", "interval:", "interval:interval:x", "a" * 4000, "cfg ", "CFG")
            )
            return Case("guidance", self._with(name, f"--guidance={wrong}"))
        key = self.draw.choice(list(numbers))
        return Case(
            "guidance", self._with(name, f"--guidance={method}", f"--guidance.{key}={self.wrong(numbers[key])}")
        )

    def settings(self) -> Case:
        method = self.draw.choice(list(SEARCHES))
        kind = SEARCHES[method].config
        numbers = {n: r for n, h in get_type_hints(kind, include_extras=True).items() if (r := range_of(h))}
        key = self.draw.choice([*numbers, "nothing", ""])
        value = self.wrong(numbers[key]) if key in numbers else "1"
        value = "y" if value.lower() == "none" else value  # a number may be none
        words = ["search", method, *self.bases["search"][2:], f"--setting={key}={value}"]
        return Case("setting", words)

    def optimizers(self) -> Case:
        kind = self.draw.choice(list(OPTIMIZERS))
        numbers = {n: r for n, h in get_type_hints(OPTIMIZERS[kind], include_extras=True).items() if (r := range_of(h))}
        key = self.draw.choice(list(numbers))
        drawn = f"{kind}[{key}={self.draw.choice(('nan', 'x', '[1]', repr('a')))}]"
        return Case("optimizer", self._with("optimize", f"--optimizer={self.draw.choice((*OPTIMISERS, drawn))}"))

    def flags(self) -> Case:
        name = self._one()
        wrong = (
            ["--sede", "3"], ["--seed"], ["--seed", "3", "4"], ["--config", "absent.yaml"],
            ["--config", str(self.full)], ["--model", "tinny"], ["--model", ""],
            ["--model", str(self.full)], ["--model", str(self.file)],
            ["--memory_budget", "6XB"], ["--memory_budget", "-1"], ["--lora", "absent"], ["--lora", f"{self.full}=x"],
            ["--gradient", "fulll"], ["--report_to", "nobody"], ["--resume_from_checkpoint", "absent"], ["--guidance."],
            ["--guidance.scale", "1", "--guidance.scale", "2"], ["--prompts", "absent.txt"], ["--prompts", "shapes:x"],
        )  # fmt: skip
        words = self.draw.choice([flags for flags in wrong if self._knows(name, flags[0])])
        return Case("flag", self._with(name, *words))

    def _knows(self, name: str, flag: str) -> bool:
        known = {opt for p in self.commands[name].params for opt in p.opts}
        return flag == "--sede" or flag in known or (flag.startswith("--guidance.") and "--guidance.KEY" in known)

    def models(self) -> Case:
        """A model folder with one part broken or gone."""
        folder = self.path()
        shutil.copytree(self.model, folder)
        victims = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in HARMLESS)
        self._break(self.draw.choice(victims))
        name = self._one("sample", "eval", "compare", "train", "optimize", "search")
        words = [str(folder) if word == str(self.model) else word for word in self.bases[name]]
        return Case("model", words, loads=True)

    def _break(self, file: Path) -> None:
        data = file.read_bytes()
        how = self.draw.choice(("gone", "empty", "cut", "text", "list", "wrong"))
        if how == "gone":
            file.unlink()
        elif how == "wrong" and file.name == "model_index.json":
            index = json.loads(data)
            part = self.draw.choice([key for key in index if isinstance(index[key], list) and index[key][0]])
            index[part] = self.draw.choice(
                (["diffusers", "Nothing"], ["nowhere", "Thing"], [None, None], "x", 3, ["os", "system"])
            )
            file.write_text(json.dumps(index))
        else:
            wrong = {"empty": b"", "cut": data[: len(data) // 2], "text": b"not what it was", "list": b"[1, 2]"}
            file.write_bytes(wrong.get(how, b"\xff\xfe\x00"))

    def loras(self) -> Case:
        folder = self.path()
        folder.mkdir()
        weights = folder / "pytorch_lora_weights.safetensors"
        weights.write_bytes(
            self.draw.choice((b"", b"x", b"\0" * 8, b"\xff" * 64, _safetensors({}), _safetensors({"a": 1})))
        )
        return Case(
            "lora", self._with(self._one("sample", "eval", "compare", "search"), "--lora", str(folder)), loads=True
        )

    def pictures(self) -> Case:
        path = self.path(".png")
        good = self.picture.read_bytes()
        path.write_bytes(self.draw.choice((b"", good[:40], b"text", good[:20] + b"\xff" * 4 + good[24:], _huge())))
        if self.draw.random() < 0.5:
            return Case("picture", ["score", "--reward", "brightness", "--", str(path)])
        return Case("picture", self._with("optimize", "--start", str(path)), loads=True)

    def checkpoints(self) -> Case:
        """A run that is gone on from, a value of whose state or metrics was edited, the manifest to match."""
        name, folder = self.draw.choice(list(self.runs)), self.path()
        shutil.copytree(self.runs[name], folder)
        file = self.draw.choice(sorted([*folder.rglob("state.json"), *folder.rglob("metrics.jsonl")]))
        lines = file.read_text().splitlines()
        line = self.draw.randrange(len(lines)) if file.suffix == ".jsonl" else slice(None)
        text, said = self._edited(lines[line] if isinstance(line, int) else "\n".join(lines))
        lines[line] = text if isinstance(line, int) else [text]
        file.write_text("\n".join(lines) + "\n")
        manifest = file.parent / "manifest.json"
        if manifest.is_file():
            names = json.loads(manifest.read_text())
            manifest.write_text(json.dumps({n: sha256((file.parent / n).read_bytes()).hexdigest() for n in names}))
        words = self._longer(name, 2, folder, "--resume_from_checkpoint", "latest")
        return Case(f"checkpoint {file.name} {said}", words, loads=True, may_run=True)

    def _edited(self, text: str) -> tuple[str, str]:
        """A JSON text one of whose values, at any depth, is gone or another; and what was done."""
        if self.draw.random() < 0.1:
            wrong = self.draw.choice((text[:-1], "", "[]", "\0", "[" * 3000))
            return wrong, f"is {wrong[:10]!r}"
        found = json.loads(text)
        place = self.draw.choice(list(_places(found)))
        key = self.draw.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        how = self.draw.choice(("gone", None, [], {}, "text", -1, 1.5, 10**30, True, [1, "a"], {"a": 1}, math.nan))
        if how == "gone":
            del place[key]
        else:
            place[key] = how
        return json.dumps(found), f"{key} {how!r}"

    def files(self) -> Case:
        """A file of prompts, labels, an earlier evaluation or noises that holds something else."""
        path = self.path(self.draw.choice((".txt", ".json", ".jsonl", ".safetensors", ".csv")))
        path.write_bytes(
            self.draw.choice((b"", b"\n\n", b"\xff\xfe", b"\x80abc", b"a\0b", b"[" * 3000, b"9" * 5000 + b"\n" * 9))
        )
        empty = path.suffix == ".txt" and path.read_bytes().strip() not in (b"", b"\xff\xfe", b"\x80abc", b"a\0b")
        places = [
            ("eval", "--baseline"), ("sample", "--noise"), ("train d3po", "--labels"), ("train dpo", "--labels"),
            ("train kto", "--labels"), ("label", "--prompts"), ("label", "--images"), ("train pso", "--images"),
            ("train dragon", "--exemplars"),
        ]  # fmt: skip
        if not empty:
            places += [("train alignprop", "--prompts"), ("train ddpo", "--prompts")]
            path.write_bytes(self.draw.choice((b"", b"\n\n", b"\xff\xfe", b"\x80abc", b"a\0b")))
        name, flag = self.draw.choice(places)
        more = ["--objective", "vendi"] if False else []
        more = ["--objective=frechet", "--encoder=tiny-clip"] if flag == "--exemplars" else more
        if flag == "--exemplars":
            path.write_bytes(self.draw.choice((b"", b"\xff\xfe\x00", b"\x80abc", b"a\0b")))
        return Case("file", self._with(name, f"{flag}={path}", *more))


HARMLESS = {
    "README.md",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "generation_config.json",
}
HARMLESS |= {"tokenizer.json", "vocab.json", "merges.txt", "preprocessor_config.json"}


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name, command in cli.commands.items():
        for inner, below in command.commands.items() if isinstance(command, click.Group) else ():
            yield f"{name} {inner}", below
        yield name, command


def _places(found: Any) -> Iterator[Any]:
    """The objects and lists of a JSON value that hold something."""
    if isinstance(found, dict | list) and found:
        yield found
        for inner in found.values() if isinstance(found, dict) else found:
            yield from _places(inner)


def _reads(text: str, within: Range) -> bool:
    try:
        Number(within).convert(text, None, None)
    except click.BadParameter:
        return False
    return True


def _safetensors(header: dict[str, Any]) -> bytes:
    data = json.dumps(header).encode()
    return len(data).to_bytes(8, "little") + data


def _huge() -> bytes:
    """The head of a PNG of 60,000 x 60,000 pixels."""
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
