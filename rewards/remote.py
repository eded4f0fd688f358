"""A reward on another machine: a client that is a reward, and a server of any reward. JSON and PNG, never pickles."""

import base64
import binascii
import hmac
import io
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from threading import BoundedSemaphore, Lock
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.checks import eight_bit, finite, paired
from rewards.errors import RewardError, Unreachable
from rewards.registry import Reward

TOKEN = "DIFFTUNE_REWARD_TOKEN"  # of the environment: what client and server share
ANSWER = 2**20  # bytes that a client reads of an answer


@dataclass(frozen=True)
class Remote:
    """The scores that the server at `url` gives, as PNG sees the pictures: in 8 bits.

    `batch_size` images are sent at a time, and a part must be answered within `timeout` seconds. Raises
    ConnectionError, in one sentence, where there is no answer or one that is no score.
    """

    url: str
    token: str | None = None  # None: that of the environment
    timeout: float = 60.0
    batch_size: int = 16
    differentiable = False

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise RewardError(f"the URL of a reward server starts with http:// or https://, not {self.url!r}")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        pictures = [base64.b64encode(png(x)).decode() for x in eight_bit(images).permute(0, 2, 3, 1).cpu().numpy()]
        parts = range(0, len(images), self.batch_size)
        scores = [
            s for i in parts for s in self._asked(pictures[i:][: self.batch_size], prompts[i:][: self.batch_size])
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _asked(self, pictures: Sequence[str], prompts: Sequence[str]) -> list[float]:
        body = json.dumps({"images": list(pictures), "prompts": list(prompts)}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token or _token()}"}
        try:
            ask = urllib.request.Request(f"{self.url.rstrip('/')}/score", body, headers)
            with OPENER.open(ask, timeout=self.timeout) as answer:
                return _scores(json.loads(answer.read(ANSWER)), len(prompts))
        except urllib.error.HTTPError as error:
            with error:
                why = error.read(ANSWER).decode(errors="replace").strip()
            raise Unreachable(f"the reward server {self.url} refused with {error.code}: {why}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unreachable(f"no scores from the reward server {self.url}: {error}") from error


class Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the token elsewhere: its status is what the client is told."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(Stays)


def _scores(answer: dict[str, Any], count: int) -> list[float]:
    scores = [float(score) for score in answer["scores"]]
    if len(scores) != count:
        raise RewardError(f"{len(scores)} scores for {count} images")
    return scores


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _token() -> str:
    return os.environ.get(TOKEN, "")


# ------------------------------------------------------------------------------------------------ the server


@dataclass(frozen=True)
class Limits:
    """What a server takes before it refuses."""

    body: int = 64 * 2**20  # bytes of a request: 413
    images: int = 64  # of a request: 413
    pixels: int = 2**24  # of all images of a request: 413
    connections: int = 64  # at a time; the next one is told 503
    seconds: float = 30.0  # without a byte from a client, which is then dropped


class Refused(Exception):
    """A request that is answered with a status other than 200, and one sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves a reward at POST /score: {"images": [PNG in base64], "prompts": [str]} -> {"scores": [float]}.

    Statuses: 400 what is no such JSON or no PNG, 401 a wrong token, 404 another path, 411 no length, 413 more than the
    `limits`, 422 what the reward refuses, 500 where it fails, 503 too many connections. One batch is scored at a time.
    Without a token it may only listen on this machine: otherwise it raises ValueError, as for a device that is not
    there; OSError where it cannot listen.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        limits: Limits = Limits(),
        device: str = "cpu",
    ):
        if not token and not _loopback(host):
            raise RewardError(f"{host} can be reached from elsewhere: give a token, or listen on 127.0.0.1")
        _there(device)
        self.reward, self.token, self.limits, self.device = reward, token, limits, device
        self.one_at_a_time = Lock()
        self.free = BoundedSemaphore(limits.connections)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        host = self.server_name
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def server_bind(self) -> None:
        """Without the name look-up of HTTPServer, which may wait for a network."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(self.server_address)
        except OSError as error:
            where = f"{self.server_address[0]!s}, port {self.server_address[1]}"
            raise Unreachable(f"cannot listen on {where}: {error.strerror}; choose another --port") from error
        self.server_address = self.socket.getsockname()
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.free.acquire(blocking=False):
            _turned_away(request)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""

    def scored(self, pictures: list[str], prompts: list[str]) -> list[float]:
        """Scores of PNGs in base64, those of one size together."""
        with self.one_at_a_time, torch.no_grad():
            images = _decoded(pictures, self.limits.pixels)
            scores = [0.0] * len(images)
            for size in {x.shape for x in images}:
                rows = [i for i, x in enumerate(images) if x.shape == size]
                batch = torch.stack([images[i] for i in rows]).to(self.device)
                for i, score in zip(rows, self._asked(batch, [prompts[i] for i in rows]), strict=True):
                    scores[i] = score
        return finite(torch.tensor(scores, dtype=torch.float64), "a score").tolist()

    def _asked(self, images: Tensor, prompts: list[str]) -> list[float]:
        try:
            return self.reward(images, prompts).tolist()
        except OSError as error:  # which would look like a client that has gone
            raise Refused(500, f"the reward failed: {type(error).__name__}") from error


def _there(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RewardError(f"there is no device {device!r}: {str(error).partition(chr(10))[0]}") from error


def _loopback(host: str) -> bool:
    return host == "localhost" or ((host.replace(".", "").isdecimal() or ":" in host) and ip_address(host).is_loopback)


def _turned_away(request: socket.socket) -> None:
    """Tells a client that all connections are taken, in a fifth of a second at most."""
    request.settimeout(0.2)
    with suppress(OSError):
        request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        _drained(request, 2**20)


def _drained(request: socket.socket, most: int) -> None:
    """Reads what the client still sends, so that it gets to read our answer instead of a reset."""
    request.shutdown(socket.SHUT_WR)
    while most > 0 and (found := request.recv(2**16)):
        most -= len(found)


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Server
    server_version, sys_version = "difftune", ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.seconds)

    def do_GET(self) -> None:
        self._answer(404, {"error": "scores are at POST /score"})

    def do_POST(self) -> None:
        try:
            self._answer(200, self._score())
        except Refused as refused:
            self._answer(refused.status, {"error": str(refused)})
        except ValueError as error:
            self._answer(422, {"error": str(error)})
        except OSError:
            return  # the client has gone
        except Exception as error:  # whatever a reward raises must not end the server
            self._answer(500, {"error": f"the reward failed: {type(error).__name__}"})

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a token or a prompt is not written down."""

    def _answer(self, status: int, said: dict[str, Any]) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        with suppress(OSError):
            self.connection.settimeout(1.0)
            _drained(self.connection, self.server.limits.body)

    def _score(self) -> dict[str, Any]:
        if self.path != "/score":
            raise Refused(404, "scores are at POST /score")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.token and not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(401, "the token is wrong")
        asked = _json(self._body())
        pictures, prompts = asked["images"], asked["prompts"]
        if len(pictures) > self.server.limits.images:
            raise Refused(413, f"{len(pictures)} images in one request: {self.server.limits.images} is the limit")
        return {"scores": self.server.scored(pictures, prompts)}

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "a request says its Content-Length")
        if int(length) > self.server.limits.body:
            raise Refused(413, f"{length} bytes in one request: {self.server.limits.body} is the limit")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client has gone")
        return body


def _json(body: bytes) -> dict[str, Any]:
    """{"images": [str], "prompts": [str]} of one length, 1 at least."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error
    lists = [asked.get(key) if isinstance(asked, dict) else None for key in ("images", "prompts")]
    if not all(isinstance(x, list) and x and all(isinstance(item, str) for item in x) for x in lists):
        raise Refused(400, "the body is {images: [PNG in base64, ...], prompts: [text, ...]}")
    if len(asked["images"]) != len(asked["prompts"]):
        raise Refused(400, f"{len(asked['images'])} images and {len(asked['prompts'])} prompts")
    return asked


def _decoded(pictures: list[str], pixels: int) -> list[Tensor]:
    """(3, H, W) in [0, 1] of each PNG in base64; the size of all is read before any pixel is."""
    images = [_opened(picture) for picture in pictures]
    total = sum(image.width * image.height for image in images)
    if total > pixels:
        raise Refused(413, f"images of {total} pixels in one request: {pixels} is the limit")
    return [_tensor(image) for image in images]


def _opened(text: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(400, "an image is not a PNG in base64") from error


def _tensor(image: Image.Image) -> Tensor:
    try:
        x = np.asarray(image.convert("RGB"), np.float32) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(400, "an image is a PNG that is not whole") from error
    return torch.from_numpy(x).permute(2, 0, 1)
