"""Labels by a person: a page on this machine shows pictures of one prompt, and each choice becomes a line of JSON.

    {"prompt": str, "a": path, "b": path, "choice": "a" | "b" | "tie" | "skip",
     "seed_a": int | null, "seed_b": int | null, "model": str | null, "time": ISO 8601}
    {"undo": n}                             what line n, counted from 0, said does not hold

Paths are relative to the folder of the label file. The choice of one of n > 2 pictures is n - 1 such lines, the chosen
one against each of the others, with one `time` and with `"of": n - 1`. Lines are only ever appended.
"""

import hmac
import json
import os
import secrets
import socketserver
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from difftune.errors import RunError
from difftune.labelling.label_file import Answer, LabelFile, _together, live
from difftune.labelling.tasks import Picture, Task, pictures, tasks

BODY, DRAINED = 4096, 2**20  # bytes of a request that are taken, and that are read of one that is refused
SECONDS = 30.0  # without a byte from a client, which is then dropped


# ------------------------------------------------------------------------------------------------ the pictures


# ------------------------------------------------------------------------------------------------ the label file


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
