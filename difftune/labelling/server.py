"""Labels by a person: a page on this machine shows pictures of one prompt, and each choice becomes a line of JSON.

    {"prompt": str, "a": path, "b": path, "choice": "a" | "b" | "tie" | "bad" | "skip",
     "seed_a": int | null, "seed_b": int | null, "model": str | null, "time": ISO 8601}
    {"undo": n}                             what line n, counted from 0, said does not hold

Paths are relative to the folder of the label file. A choice among n > 2 pictures is n - 1 such lines, the chosen
one against each other one, all with the same `time` and with `"of": n - 1`. Lines are only ever appended.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from difftune.errors import RunError
from difftune.labelling.label_file import LabelFile
from difftune.labelling.session import WORDS, Session
from difftune.labelling.tasks import Picture, draw_tasks, pictures_to_label
from rewards.network import http
from rewards.network.http import Answer, Refused

BODY = 4096  # bytes of a request
SECONDS = 30.0  # for a request to arrive, and for its answer to leave
AHEAD = 2  # tasks whose pictures the page loads before they are shown


class Server(http.Server):
    """The page and its requests, on this machine alone, under a path that only who started it knows.

    GET / is the page, GET /state and GET /image/N are its contents, POST /label {"task": N, "choice": N | "tie" |
    "bad" | "skip"} and POST /undo answer with the new state, all below the token. Statuses: 400 what is not such JSON,
    403 another host or origin, 404 another path, 409 a task that has its label, 411 no length, 413 a long body, 415
    another content type, 500 if the label could not be written.
    """

    def __init__(self, session: Session, port: int = 0):
        self.session, self.token, self.writing = session, secrets.token_urlsafe(16), Lock()
        self.shown = list(session.names)
        self.number = {picture: i for i, picture in enumerate(self.shown)}
        try:
            super().__init__(("127.0.0.1", port), Handler, seconds=SECONDS)
        except OSError as error:
            raise RunError(f"cannot listen on port {port}: {error.strerror}; --port 0 takes a free one") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def state(self) -> dict[str, Any]:
        """What the page shows: the next task, those after it, and how many of all have labels."""
        counts, upcoming = self.session.counts, [self._about(i) for i in self.session.next(1 + AHEAD)]
        found = {
            "task": upcoming[0] if upcoming else None,
            "done": counts["done"],
            "total": len(self.session.todo),
            "can_undo": bool(self.session.holding),
        }
        more = {"next": upcoming[1:], "skipped": counts["skipped"]}
        return found | {key: value for key, value in more.items() if value}

    def _about(self, task: int) -> dict[str, Any]:
        group = self.session.todo[task]
        return {"id": task, "prompt": group[0].prompt, "images": [f"image/{self.number[p]}" for p in group]}

    def label(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        task, choice, todo = asked.get("task"), asked.get("choice"), self.session.todo
        if type(task) is not int or not 0 <= task < len(todo):
            raise Refused(400, f"there is no task {task!r}")
        if not (choice in WORDS or (type(choice) is int and 0 <= choice < len(todo[task]))):
            raise Refused(400, f"the choice {choice!r} is not a picture of the task, nor {', nor '.join(WORDS)}")
        with self.writing:
            if self.session.state[task] == "done":
                raise Refused(409, "this task has its label already")
            self.session.choose(task, choice)
            return self.state()

    def undo(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        with self.writing:
            self.session.undo()
            return self.state()


class Handler(http.Handler):
    """The page's requests."""

    server: Server
    headers_of_all = {
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
    }

    def get(self) -> Answer:
        place = self._place()
        kind, _, number = place.partition("/")
        if place == "":
            return _page()
        if place == "state":
            with self.server.writing:
                return http.as_json(self.server.state())
        if kind == "image" and number.isdecimal() and len(number) < 9 and int(number) < len(self.server.shown):
            return _image(self.server.shown[int(number)])
        raise Refused(404, "nothing is here")

    def post(self) -> Answer:
        answer = {"label": self.server.label, "undo": self.server.undo}.get(self._place())
        if answer is None:
            raise Refused(404, "nothing is here")
        return http.as_json(answer(http.object_of(self.body(BODY))))

    def failed(self, error: Exception) -> Refused:
        if isinstance(error, RunError):
            return Refused(500, str(error))
        raise error

    def _place(self) -> str:
        """The path below the token, of a request that comes from our own page or from who has its address."""
        self.from_here()
        self.same_origin()
        _, token, place = (self.path.partition("?")[0] + "//").split("/", 2)
        if not self.known(token, self.server.token):
            raise Refused(404, "nothing is here: open the whole address that `difftune label` printed")
        return place.rstrip("/")


def _image(picture: Picture) -> Answer:
    try:
        return picture.file.read_bytes(), picture.mime, {}
    except OSError as error:
        raise Refused(404, f"the picture cannot be read: {error.strerror}") from error


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

    Raises UserError, before the label file is touched, if there is nothing to choose.
    """
    todo = draw_tasks(pictures_to_label(images, prompts), grid, rounds, seed)
    path = Path(images, "labels.jsonl") if labels is None else Path(labels)
    there = path.exists()
    file = LabelFile.open(path)
    try:
        return Server(Session(todo, file), port)
    except BaseException:
        if not there:
            path.unlink()
        file.close()
        raise
