"""Labels by a person: a page on this machine shows pictures of one prompt, and each choice becomes a line of JSON.

    {"prompt": str, "a": path, "b": path, "choice": "a" | "b" | "tie" | "skip",
     "seed_a": int | null, "seed_b": int | null, "model": str | null, "time": ISO 8601}
    {"undo": n}                             what line n, counted from 0, said does not hold

Paths are relative to the folder of the label file. The choice of one of n > 2 pictures is n - 1 such lines, the chosen
one against each of the others, with one `time` and with `"of": n - 1`. Lines are only ever appended.
"""

import csv
import fcntl
import hmac
import io
import json
import os
import random
import secrets
import socketserver
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from difftune.errors import RunError, UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what every browser shows
TABLES = ("prompts.json", "prompts.jsonl", "prompts.csv", "metadata.jsonl", "metadata.csv")  # looked for in this order
BODY, DRAINED = 4096, 2**20  # bytes of a request that are taken, and that are read of one that is refused
SECONDS = 30.0  # without a byte from a client, which is then dropped


class Picture(NamedTuple):
    """A picture, and what is known of how it was made."""

    file: Path
    prompt: str
    seed: int | None
    model: str | None
    mime: str


Task = tuple[Picture, ...]  # pictures of one prompt, in the order in which they are shown
Answer = tuple[bytes, str, dict[str, str]]  # body, content type, further headers


# ------------------------------------------------------------------------------------------------ the pictures


def pictures(folder: str | Path, table: str | Path | None = None) -> list[Picture]:
    """The pictures of a folder and their prompts, from a `table` of `file` and `prompt` (JSON, JSON lines or CSV).

    Without one, they are those of the sample.json of `difftune sample`, in the folder or in folders in it, else of a
    prompts.json, .jsonl or .csv, or a metadata.jsonl or .csv. Raises UserError where there is none, a picture is
    missing or is none, or a prompt is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder: give one that `difftune sample` wrote, or one with pictures")
    found = [p for t in _tables(folder, table) for p in _listed(t)]
    if len({p.file for p in found}) < len(found):
        raise UserError(f"a picture of {folder} is listed twice: give each one prompt")
    return found


def _tables(folder: Path, table: str | Path | None) -> list[tuple[Path, Path]]:
    """(a table, the folder that its files are relative to)."""
    if table is not None:
        return [(Path(table), folder)]
    samples = [folder / "sample.json", *sorted(folder.glob("*/sample.json"))]
    if made := [(path, path.parent) for path in samples if path.is_file()]:
        return made
    if own := [folder / name for name in TABLES if (folder / name).is_file()]:
        return [(own[0], folder)]
    raise UserError(
        f"{folder} has no sample.json and no prompts.json: say with --prompts FILE which prompt a picture is of"
    )


def _listed(table: tuple[Path, Path]) -> Iterator[Picture]:
    path, folder = table
    for i, record in enumerate(_records(path)):
        yield _picture(record, folder, f"entry {i} of {path}")


def _records(path: Path) -> list[Mapping[str, Any]]:
    """[{"file", "prompt", ...}] of a table, of the file's own kind."""
    try:
        text = path.read_text("utf-8-sig")
        found = _parsed(path.suffix.lower(), text)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"cannot read the prompts of {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not found or not all(isinstance(record, dict) for record in found):
        raise UserError(f"{path} lists no pictures: it holds entries with the keys file and prompt")
    return found


def _parsed(suffix: str, text: str) -> Any:
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if suffix != ".json":
        raise ValueError("it is no .json, .jsonl or .csv")
    found = json.loads(text)
    if isinstance(found, dict) and isinstance(found.get("images"), list):  # sample.json
        model = found["settings"].get("model") if isinstance(found.get("settings"), dict) else None
        return [{"model": model, **i} if isinstance(i, dict) else i for i in found["images"]]
    return [{"file": file, "prompt": prompt} for file, prompt in found.items()] if isinstance(found, dict) else found


def _picture(record: Mapping[str, Any], folder: Path, where: str) -> Picture:
    name, prompt = (record.get(key, record.get(other)) for key, other in (("file", "file_name"), ("prompt", "text")))
    if not isinstance(name, str) or not name or not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} lacks a file or a prompt: both are texts that are not empty")
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {name} lies outside {folder}")
    seed, model = record.get("seed"), record.get("model")
    return Picture(file, prompt, _seed(seed, where), str(model) if model else None, _mime(file))


def _seed(value: Any, where: str) -> int | None:
    try:
        return None if value in (None, "") else int(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the seed {value!r} is no whole number") from error


def _mime(file: Path) -> str:
    """What the file's first bytes say that it is."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return str(image.get_format_mimetype())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} is no picture that a browser shows ({', '.join(FORMATS)}), or cannot be read"
        ) from error


def tasks(found: Sequence[Picture], size: int = 2, rounds: int = 1, seed: int = 0) -> list[Task]:
    """What is shown: `size` pictures of one prompt at a time, so that each picture is shown once in a round.

    The order of the tasks and of the pictures in one is random, and a function of the seed and the pictures alone. A
    last group that is too small is filled up with pictures that the round has shown; a prompt with fewer than `size`
    pictures is shown with what it has, one with a single picture not at all. Raises UserError where there is no choice.
    """
    groups: dict[str, list[Picture]] = {}
    for picture in found:
        groups.setdefault(picture.prompt, []).append(picture)
    drawn = [t for prompt, group in groups.items() for t in _drawn(group, size, rounds, f"{seed} {prompt}")]
    if not drawn:
        raise UserError("no prompt has two pictures: make more of each with `difftune sample --num_images 4`")
    once = list({frozenset(p.file for p in task): task for task in drawn}.values())
    random.Random(f"{seed}").shuffle(once)
    return once


def _drawn(group: Sequence[Picture], size: int, rounds: int, seed: str) -> Iterator[Task]:
    if len(group) < 2:
        return
    rng = random.Random(seed)
    for _ in range(rounds):
        order = rng.sample(list(group), len(group))
        starts = range(0, len(order), size)
        for chosen in ((order[i : i + size] + order[: max(0, i + size - len(order))])[:size] for i in starts):
            yield tuple(rng.sample(unique := list(dict.fromkeys(chosen)), len(unique)))


# ------------------------------------------------------------------------------------------------ the label file


@dataclass(frozen=True)
class LabelFile:
    """An append-only file of labels that this process alone writes, and its lines."""

    path: Path
    descriptor: int
    lines: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path) -> "LabelFile":
        """The file, repaired: its last line, which a crash may have torn, and a choice that lacks some of its lines.

        A last line without its end gets its line break where it is whole JSON; else its bytes are moved to PATH.torn. A
        choice of several lines that are not all there is undone. Raises UserError where another process writes the file
        or a line is no label.
        """
        descriptor = _locked(path)
        try:
            labels = cls(path, descriptor, _lines(_repaired(descriptor, path), path))
            labels.append([{"undo": i} for i in _halves(labels.lines)])
        except BaseException:
            os.close(descriptor)
            raise
        return labels

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the lines at once and wait for the disk. RunError where that fails: the file is then as it was."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        size = os.fstat(self.descriptor).st_size
        try:
            if os.write(self.descriptor, data) != len(data):
                raise OSError("the disk is full")
            os.fsync(self.descriptor)
        except OSError as error:
            os.ftruncate(self.descriptor, size)
            raise RunError(f"the label was not written to {self.path}: {error}") from error
        self.lines.extend(lines)

    def close(self) -> None:
        os.close(self.descriptor)


def _locked(path: Path) -> int:
    """The file open for appending, made where there is none, and locked until it is closed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write labels to {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _synced(path.parent)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{path} is written by another `difftune label`: end that, or give another --labels") from error
    return descriptor


def _synced(folder: Path) -> None:
    """Wait until the disk knows of the folder's new files."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _repaired(descriptor: int, path: Path) -> bytes:
    """The whole lines of the file, whose torn end is repaired first."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    whole, torn = data[:end], data[end:]
    if torn and _is_json(torn):
        os.write(descriptor, b"\n")
        return data + b"\n"
    if torn:
        with open(path.with_name(path.name + ".torn"), "ab") as aside:
            aside.write(torn + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        os.ftruncate(descriptor, end)
    return whole


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    lines = []
    for i, line in enumerate(data.splitlines()):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {i} of {path}, counted from 0, is no JSON: mend it, or give --labels") from error
        if not isinstance(found, dict) or not ("undo" in found or {"a", "b", "choice"} <= found.keys()):
            raise UserError(f"line {i} of {path}, counted from 0, is no label: mend it, or give --labels")
        lines.append(found)
    return lines


def live(lines: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """{line number: label} of the labels that no later line undoes."""
    undone = {line["undo"] for line in lines if "undo" in line}
    return {i: line for i, line in enumerate(lines) if "undo" not in line and i not in undone}


def _halves(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """The labels that hold of choices of which not all lines hold."""
    holding = live(lines)
    return [i for i, line in holding.items() if len(_together(holding, i)) < line.get("of", 1)]


def _together(holding: Mapping[int, Mapping[str, Any]], i: int) -> list[int]:
    """The labels that one choice wrote together with label i."""
    if "of" not in holding[i]:
        return [i]
    return [j for j, line in holding.items() if "of" in line and line["time"] == holding[i]["time"]]


# ------------------------------------------------------------------------------------------------ labelling


@dataclass(frozen=True)
class Session:
    """Tasks, the file that their labels go to, and what of them is left."""

    todo: Sequence[Task]
    labels: LabelFile

    def done(self) -> list[bool]:
        """Whether each task has its labels: one picture is compared with all others of it."""
        pairs = {frozenset((line["a"], line["b"])) for line in live(self.labels.lines).values()}
        return [_compared([self.name(p) for p in task], pairs) for task in self.todo]

    def name(self, picture: Picture) -> str:
        """The picture's path as the label file tells it."""
        return Path(os.path.relpath(picture.file, self.labels.path.parent.resolve())).as_posix()

    def choose(self, task: int, choice: int | str) -> None:
        """Write that of a task picture number `choice` is the best, or "tie", or "skip"."""
        self.labels.append(list(self._said(self.todo[task], choice)))

    def _said(self, task: Task, choice: int | str) -> Iterator[dict[str, Any]]:
        best, time = choice if isinstance(choice, int) else 0, datetime.now(UTC).isoformat()
        several = {"of": len(task) - 1} if len(task) > 2 else {}
        for other in (i for i in range(len(task)) if i != best):
            a, b = (task[i] for i in sorted((best, other)))
            word = choice if isinstance(choice, str) else "a" if best < other else "b"
            yield {
                "prompt": a.prompt,
                "a": self.name(a),
                "b": self.name(b),
                "choice": word,
                "seed_a": a.seed,
                "seed_b": b.seed,
                "model": a.model if a.model == b.model else None,
                "time": time,
                **several,
            }

    def undo(self) -> None:
        """Take back the last choice that holds, of this session or an earlier one."""
        holding = live(self.labels.lines)
        if holding:
            self.labels.append([{"undo": i} for i in _together(holding, max(holding))])


def _compared(names: Sequence[str], pairs: set[frozenset[str]]) -> bool:
    return any(all(frozenset((one, other)) in pairs for other in names if other != one) for one in names)


# ------------------------------------------------------------------------------------------------ the server


class Refused(Exception):
    """A request that is answered with a status other than 200, and one sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Server(socketserver.ThreadingTCPServer):
    """The page and its requests, on this machine alone, under a path that only who started it knows.

    GET / is the page, GET /state and GET /image/N are its contents, POST /label {"task": N, "choice": N | "tie" |
    "skip"} and POST /undo answer with the new state, all below the token. Statuses: 400 what is no such JSON, 403
    another host or origin, 404 another path, 409 a task that has its label, 411 no length, 413 a long body, 415 another
    content type, 500 where the label could not be written.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, session: Session, port: int = 0):
        self.session, self.token, self.lock = session, secrets.token_urlsafe(16), Lock()
        self.shown = list(dict.fromkeys(p for task in session.todo for p in task))
        self.number = {picture: i for i, picture in enumerate(self.shown)}
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise RunError(f"cannot listen on port {port}: {error.strerror}; --port 0 takes a free one") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""

    def state(self) -> dict[str, Any]:
        """What the page shows: the next task, and how many of all have labels."""
        done = self.session.done()
        task = next((i for i, labelled in enumerate(done) if not labelled), None)
        return {
            "task": None if task is None else self._about(task),
            "done": sum(done),
            "total": len(done),
            "can_undo": bool(live(self.session.labels.lines)),
        }

    def _about(self, task: int) -> dict[str, Any]:
        group = self.session.todo[task]
        return {"id": task, "prompt": group[0].prompt, "images": [f"image/{self.number[p]}" for p in group]}

    def label(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        task, choice, todo = asked.get("task"), asked.get("choice"), self.session.todo
        if type(task) is not int or not 0 <= task < len(todo):
            raise Refused(400, f"there is no task {task!r}")
        if not (choice in ("tie", "skip") or (type(choice) is int and 0 <= choice < len(todo[task]))):
            raise Refused(400, f"the choice {choice!r} is no picture of the task, nor tie, nor skip")
        with self.lock:
            if self.session.done()[task]:
                raise Refused(409, "this task has its label already")
            self.session.choose(task, choice)
            return self.state()

    def undo(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.session.undo()
            return self.state()


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Server
    server_version, sys_version = "difftune", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(lambda: self._post(self._body()))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the token is not written down."""

    def _answered(self, answer: Callable[[], Answer]) -> None:
        try:
            body, kind, headers = answer()
            status = 200
        except Refused as refused:
            body, kind, headers, status = *_json({"error": str(refused)}), refused.status
        except RunError as error:
            body, kind, headers, status = *_json({"error": str(error)}), 500
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _place(self) -> str:
        """The path below the token, of a request that comes from our own page or from who has its address."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.partition(":")[0] not in ("127.0.0.1", "localhost"):
            raise Refused(403, "this page is for this machine: open it at 127.0.0.1")
        if origin is not None and origin != f"http://{host}":
            raise Refused(403, "another site may not ask here")
        _, token, place = (self.path.partition("?")[0] + "//").split("/", 2)
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(404, "nothing is here: open the whole address that `difftune label` printed")
        return place.rstrip("/")

    def _get(self) -> Answer:
        place = self._place()
        kind, _, number = place.partition("/")
        if place == "":
            return _page()
        if place == "state":
            with self.server.lock:
                return _json(self.server.state())
        if kind == "image" and number.isdecimal() and len(number) < 9 and int(number) < len(self.server.shown):
            return self._image(self.server.shown[int(number)])
        raise Refused(404, "nothing is here")

    def _image(self, picture: Picture) -> Answer:
        try:
            return picture.file.read_bytes(), picture.mime, {}
        except OSError as error:
            raise Refused(404, f"the picture cannot be read: {error.strerror}") from error

    def _post(self, body: bytes) -> Answer:
        answer = {"label": self.server.label, "undo": self.server.undo}.get(self._place())
        if answer is None:
            raise Refused(404, "nothing is here")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a request is application/json")
        return _json(answer(_asked(body)))

    def _body(self) -> bytes:
        """The body, read before anything is refused: a client reads no answer while it still sends."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(411, "a request says its Content-Length")
        if len(length) > 9 or int(length) > BODY:
            self.rfile.read(min(int(length[:9]), DRAINED))
            raise Refused(413, f"{length[:20]} bytes in one request: {BODY} is the limit")
        return self.rfile.read(int(length))


def _asked(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(asked, dict):
        raise Refused(400, "the body is a JSON object")
    return asked


HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _json(said: Mapping[str, Any]) -> Answer:
    return json.dumps(said).encode(), "application/json", {}


def _page() -> Answer:
    """The page, which loads nothing but pictures from here and runs nothing but its own script."""
    nonce = secrets.token_urlsafe(16)
    environment = Environment(loader=PackageLoader("difftune.labelling"), autoescape=True, undefined=StrictUndefined)
    policy = (
        f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; "
        f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    html = environment.get_template("label.html.j2").render(nonce=nonce)
    return html.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy}


# ------------------------------------------------------------------------------------------------ the command


def open_server(
    images: str | Path,
    prompts: str | Path | None = None,
    labels: str | Path | None = None,
    grid: int = 2,
    rounds: int = 1,
    seed: int = 0,
    port: int = 0,
) -> Server:
    """`difftune label`: the server of the pictures of `images`, whose labels go to the file `labels`.

    Raises UserError, before the label file is touched, where there is nothing to choose.
    """
    todo = tasks(pictures(images, prompts), grid, rounds, seed)
    file = LabelFile.open(Path(images, "labels.jsonl") if labels is None else Path(labels))
    try:
        return Server(Session(todo, file), port)
    except BaseException:
        file.close()
        raise
