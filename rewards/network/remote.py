"""A reward on another machine: a client that is a reward, and a server of any reward. JSON and PNG, never pickles."""

import base64
import binascii
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.checks import eight_bit, finite, nan_unless_finite, png
from rewards.errors import RewardError, Unreachable
from rewards.network import client, http
from rewards.registry import Reward

TOKEN = "DIFFTUNE_REWARD_TOKEN"  # of the environment: what client and server share


@dataclass(frozen=True)
class Remote:
    """The scores that the server at `url` gives, as PNG sees the pictures: in 8 bits.

    `batch_size` images are sent at a time, and a part must be answered within `timeout` seconds. Raises
    ConnectionError, in one sentence, if there is no answer after all `retries`, or one that is not a score.
    """

    url: str
    token: str | None = None  # None: that of the environment
    timeout: float = 60.0
    batch_size: int = 16
    retries: int = 4  # of a part whose server is busy or out of reach, after 0.5, 1, 2, 4 s or when it says
    differentiable = False

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise RewardError(f"the URL of a reward server starts with http:// or https://, not {self.url!r}")

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = [base64.b64encode(png(x)).decode() for x in eight_bit(images).permute(0, 2, 3, 1).cpu().numpy()]
        parts = range(0, len(images), self.batch_size)
        scores = [
            s for i in parts for s in self._asked(pictures[i:][: self.batch_size], prompts[i:][: self.batch_size])
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _asked(self, pictures: Sequence[str], prompts: Sequence[str]) -> list[float]:
        """The scores of a part; a server that is busy, starting or out of reach is asked again, `retries` times."""
        asked, read = {"images": list(pictures), "prompts": list(prompts)}, partial(_scores, count=len(prompts))
        server = f"the reward server {self.url}"
        token = self.token or _token()
        patience = client.Patience(self.timeout, self.retries)
        return client.post(f"{self.url.rstrip('/')}/score", asked, token, read, server, patience)


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
        raise RewardError("it answered, but not with {scores: [number, ...]}")
    if len(scores) != count:
        raise RewardError(f"{len(scores)} scores for {count} images")
    return [float(score) for score in scores]


def _token() -> str:
    return os.environ.get(TOKEN, "")


# ------------------------------------------------------------------------------------------------ the server


@dataclass(frozen=True)
class Limits:
    """What a server takes before it refuses."""

    body: int = 64 * 2**20  # bytes of a request: 413
    images: int = 64  # of a request: 413
    pixels: int = 2**24  # of all images of a request: 413
    connections: int = 64  # at a time, see `rewards.network.http`
    seconds: float = 30.0  # for a request to arrive, and for its answer to leave


class Server(http.Server):
    """Serves a reward at POST /score: {"images": [PNG in base64], "prompts": [str]} -> {"scores": [float]}.

    Statuses: 400 other JSON, or a picture that is not PNG, 401 a wrong token, 403 another site's page, or without a
    token another host, 404 another path, 411 no length, 413 more than the `limits`, 415 another content type, 422 what
    the reward refuses, 500 if it fails, 503 too many connections. One batch is scored at a time.
    Without a token it may only listen on this machine: otherwise it raises ValueError, as for a device that is not
    there; OSError if it cannot listen.
    """

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        limits: Limits = Limits(),
        device: str = "cpu",
    ):
        if not token and not http.loopback(host):
            raise RewardError(f"{host} can be reached from elsewhere: give a token, or listen on 127.0.0.1")
        _there(device)
        self.reward, self.token, self.limits, self.device = reward, token, limits, device
        self.one_at_a_time = Lock()
        try:
            super().__init__((host, port), Handler, limits.connections, limits.seconds)
        except OSError as error:
            raise Unreachable(
                f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port"
            ) from error
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self) -> str:
        host = str(self.server_name)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

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
            raise http.Refused(500, f"the reward failed: {type(error).__name__}") from error


def _there(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RewardError(f"there is no device {device!r}: {str(error).partition(chr(10))[0]}") from error


class Handler(http.Handler):
    """POST /score, and nothing else."""

    server: Server

    def get(self) -> http.Answer:
        raise http.Refused(404, "scores are at POST /score")

    def post(self) -> http.Answer:
        if self.path != "/score":
            raise http.Refused(404, "scores are at POST /score")
        self.same_origin()
        if not self.server.token:
            self.from_here()
        elif not self.known(self.headers.get("Authorization", "").removeprefix("Bearer "), self.server.token):
            raise http.Refused(401, "the token is wrong")
        pictures, prompts = _asked(self.body(self.server.limits.body))
        if len(pictures) > self.server.limits.images:
            limit = self.server.limits.images
            raise http.Refused(413, f"{len(pictures)} images in one request: {limit} is the limit")
        return http.as_json({"scores": self.server.scored(pictures, prompts)})

    def failed(self, error: Exception) -> http.Refused:
        """Whatever a reward raises must not end the server; only its own sentences are told."""
        if isinstance(error, ValueError):
            return http.Refused(422, str(error))
        if isinstance(error, OSError):
            raise error  # the client has gone
        return http.Refused(500, f"the reward failed: {type(error).__name__}")


def _asked(body: bytes) -> tuple[list[str], list[str]]:
    """The images and the prompts of {"images": [str], "prompts": [str]}: as many of both, 1 at least."""
    asked = http.object_of(body)
    lists = [asked.get(key) for key in ("images", "prompts")]
    if not all(isinstance(x, list) and x and all(isinstance(item, str) for item in x) for x in lists):
        raise http.Refused(400, "the body is {images: [PNG in base64, ...], prompts: [text, ...]}")
    if len(asked["images"]) != len(asked["prompts"]):
        raise http.Refused(400, f"{len(asked['images'])} images and {len(asked['prompts'])} prompts")
    return asked["images"], asked["prompts"]


def _decoded(pictures: list[str], pixels: int) -> list[Tensor]:
    """(3, H, W) in [0, 1] of each PNG in base64; the size of all is read before any pixel is."""
    images = [_opened(picture) for picture in pictures]
    total = sum(image.width * image.height for image in images)
    if total > pixels:
        raise http.Refused(413, f"images of {total} pixels in one request: {pixels} is the limit")
    return [_tensor(image) for image in images]


def _opened(text: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise http.Refused(400, "an image is not a PNG in base64") from error


def _tensor(image: Image.Image) -> Tensor:
    try:
        x = np.asarray(image.convert("RGB"), np.float32) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise http.Refused(400, "an image is a PNG that is not whole") from error
    return torch.from_numpy(x).permute(2, 0, 1)
