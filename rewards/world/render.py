"""Scenes of coloured shapes, and their pictures."""

from dataclasses import dataclass

import numpy as np

RESOLUTION = 64
COLORS = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.12, 0.65, 0.22),
    "blue": (0.15, 0.28, 0.88),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.20, 0.72),
    "orange": (0.98, 0.52, 0.05),
}
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "black": (0.05, 0.05, 0.05), "gray": (0.50, 0.50, 0.50)}

_HALF_SQUARE = 0.88  # half side of a square of radius 1
_TRIANGLE = 1.2  # centre to corner of a triangle of radius 1
SHAPES = {  # name -> area of the shape of radius 1
    "circle": np.pi,
    "square": (2 * _HALF_SQUARE) ** 2,
    "triangle": 3 * np.sqrt(3) / 4 * _TRIANGLE**2,
}


@dataclass(frozen=True)
class Thing:
    """One object: centre (x, y) and radius r in pixels, y pointing down."""

    shape: str
    color: str
    x: float
    y: float
    r: float

    def __str__(self) -> str:
        return f"{self.color} {self.shape} at ({self.x:.0f}, {self.y:.0f}) of radius {self.r:.1f}"


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.things)) or 'nothing'} on {self.background}"


def coverage(shape: str, x: float, y: float, r: float, size: int = RESOLUTION) -> np.ndarray:
    """The share of each pixel that the shape covers, (size, size) in [0, 1]: its signed distance, one pixel soft."""
    centres = np.arange(size) + 0.5
    dx, dy = centres[None, :] - x, centres[:, None] - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - r
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - _HALF_SQUARE * r
    else:  # the three sides of an upright triangle are r * 1.2 / 2 from its centre
        distance = np.maximum(dy, np.sqrt(0.75) * np.abs(dx) - 0.5 * dy) - _TRIANGLE / 2 * r
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, size: int = RESOLUTION) -> np.ndarray:
    """The antialiased picture of a scene, (size, size, 3) float32 in [0, 1]; coordinates scale with `size`."""
    scale = size / RESOLUTION
    image = np.broadcast_to(np.array(BACKGROUNDS[scene.background]), (size, size, 3))
    for thing in scene.things:
        alpha = coverage(thing.shape, thing.x * scale, thing.y * scale, thing.r * scale, size)[:, :, None]
        image = (1 - alpha) * image + alpha * np.array(COLORS[thing.color])
    return image.astype(np.float32)
