"""Asking a server over HTTP: bounded in time and bytes, again where it may soon answer, and never redirected."""

import io
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar

from rewards.errors import Unreachable
from rewards.network import http

Found = TypeVar("Found")
ANSWER = 2**20  # bytes that a client reads of an answer
BUSY = frozenset({429, 502, 503, 504})  # statuses of a server that may soon answer
FAILED = BUSY | frozenset(range(500, 600))  # and of one that broke down, whatever it was asked
DENIED = {400, 401, 403, 404}  # of one that will say so again
MOST_SECONDS = 30.0  # between two attempts
MOST_SAID = 120.0  # between two attempts if the server says when


@dataclass(frozen=True)
class Patience:
    """An answer must come within `timeout` seconds in all. A server that is out of reach, or answers with one of the
    statuses `again`, is asked again, `retries` times: after `pause` seconds, twice as many, and so on, or when it says.
    """

    timeout: float
    retries: int
    pause: float = 0.5
    again: frozenset[int] = BUSY


def post(
    url: str, asked: Mapping[str, Any], token: str, read: Callable[[Any], Found], server: str, patience: Patience
) -> Found:
    """What `read` makes of the JSON that answers a request of JSON.

    Raises Unreachable, in one sentence that names `server`, if there is no answer, or one that `read` refuses with a
    ValueError.
    """
    body = json.dumps(asked).encode()
    for attempt in range(patience.retries):
        try:
            return _once(url, body, token, read, server, patience)
        except Busy as busy:
            time.sleep(pause(attempt, busy.seconds, patience.pause))
    return _once(url, body, token, read, server, patience)


def _once(url: str, body: bytes, token: str, read: Callable[[Any], Found], server: str, patience: Patience) -> Found:
    """Raises Busy if another attempt may help, Unreachable else."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    try:
        ask = urllib.request.Request(url, body, headers)
        with OPENER.open(ask, timeout=patience.timeout) as answer:
            return read(json.loads(_whole(answer)))
    except urllib.error.HTTPError as error:
        with error:
            why = f"{server} refused with {error.code}: {_sentence(error)}"
        if error.code in patience.again:
            raise Busy(why, seconds_of(error.headers.get("Retry-After"))) from error
        raise (Denied(why, error.code) if error.code in DENIED else Unreachable(why)) from error
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        why = f"no scores from {server}: {quoted(str(error) or type(error).__name__)}"
        raise (Busy(why) if passing(error) else Unreachable(why)) from error


class Denied(Unreachable):
    """A server that refuses the request itself: the path, the token, or what is asked; with its status."""

    def __init__(self, why: str, status: int):
        super().__init__(why)
        self.status = status


class Busy(Unreachable):
    """A server that may soon answer: after `seconds`, if it said so."""

    def __init__(self, why: str, seconds: float | None = None):
        super().__init__(why)
        self.seconds = seconds


def seconds_of(said: str | None) -> float | None:
    """The seconds of a Retry-After, which may be a date too; None if there is none that can be read."""
    try:
        return None if said is None else float(min(max(int(said), 0), 10**9))
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(str(said)) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def pause(attempt: int, said: float | None = None, first: float = 0.5) -> float:
    """Seconds before the next attempt: what the server said, `MOST_SAID` at most, else `first`, twice as many, and so
    on, `MOST_SECONDS` at most; up to a quarter more, so that clients do not come back together."""
    seconds, most = (first * 2**attempt, MOST_SECONDS) if said is None else (said, MOST_SAID)
    return min(seconds * (1 + 0.25 * random.SystemRandom().random()), most)  # training's generator stays as it is


def passing(error: Exception) -> bool:
    """Whether it may be otherwise soon: a connection that is refused or reset, but no answer that came too late."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(reason, ConnectionError) and not isinstance(reason, TimeoutError)


def _read(answer: Any) -> bytes:
    """An answer, up to `ANSWER` bytes."""
    found = b""
    while len(found) < ANSWER and (part := answer.read1(2**16)):
        found += part
    return found[:ANSWER]


def _whole(answer: Any) -> bytes:
    """An answer that did not end half-way, as that of a server which is started anew: it is asked again."""
    found = _read(answer)
    if not found or (answer.length and len(found) < ANSWER):
        raise ConnectionResetError("the answer ended half-way")
    return found


def _sentence(refusal: Any) -> str:
    """What the body of a refusal says, so far as it comes."""
    text = ""
    with suppress(OSError, HTTPException, ValueError, RecursionError):
        text = _read(refusal).decode(errors="replace")
        said = json.loads(text)
        text = said["error"] if isinstance(said, dict) and isinstance(said.get("error"), str) else text
    return quoted(text)


def quoted(text: str) -> str:
    """One line of a stranger's text: 200 characters at most, and nothing that a terminal would obey."""
    line = " ".join(text.split())
    line = line if len(line) <= 200 else f"{line[:200]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the token elsewhere: its status is what the client is told."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Timely(HTTPConnection):
    """A connection whose request must leave, and whose answer must come, within `timeout` seconds in all."""

    def connect(self) -> None:
        assert self.timeout is not None
        self.end = time.monotonic() + self.timeout
        answer: Any = partial(TimelyAnswer, end=self.end)
        self.response_class = answer  # of a proxy too, whose answer comes in `connect`
        super().connect()

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        self.sock.settimeout(http.left(self.end))
        super().send(data)


class TimelyAnswer(HTTPResponse):
    """An answer that is read until the moment `end`, however it drips: its headers too."""

    def __init__(self, sock: Any, *args: Any, end: float, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(http.Deadline(sock, end))


class TimelyEncrypted(Timely, HTTPSConnection):
    """The same by https."""


class Opens(urllib.request.HTTPHandler):
    def http_open(self, request: Any) -> Any:
        return self.do_open(Timely, request)


class OpensEncrypted(urllib.request.HTTPSHandler):
    def https_open(self, request: Any) -> Any:
        return self.do_open(TimelyEncrypted, request)


OPENER = urllib.request.build_opener(Stays, Opens, OpensEncrypted)
