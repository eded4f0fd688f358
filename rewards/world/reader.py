"""Finds the objects of a picture again, from its pixels alone."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rewards.world.render import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, coverage, render

MIN_AREA = 12.0  # pixels; less is a speck, not an object
MIN_FIT = 0.7  # intersection over union with the best-fitting ideal shape; less is not a shape that we know
MIN_PART_FIT = 0.85  # the same for each of several objects that touch: an oval cut in two would reach 0.8
MIN_PART_AREA = 60.0  # pixels; smaller objects that touch are not told apart
MOST_PARTS = 5
OUTLINE = 2  # pixels on either side of an object's outline that may have any colour between its own and the background
TOLERANCE = 0.25  # of a channel in [0, 1]: how far a pixel may be from what the scene says of it

PALETTE = BACKGROUNDS | COLORS
BLOCK = np.ones((3, 3))


def read(image: np.ndarray) -> Scene:
    """The objects of a picture, read from its pixels: image (H, W, 3) in [0, 1].

    Every pixel is given the nearest colour of the palette; each connected region that is not background is an object,
    and the ideal shape that overlaps it best names it. A region that fits no shape is cut into two to five objects of
    its colour that touch, where each of them fits one. What remains is a "blob"; a region that is not a pure colour is
    "mixed": no caption names those.
    """
    image = np.asarray(image, np.float64)
    smooth = ndimage.median_filter(image, size=(3, 3, 1))
    labels = _nearest(smooth, np.array(list(PALETTE.values())))
    ground = _ground(labels)
    base = np.median(smooth[labels == ground], axis=0) if (labels == ground).any() else np.zeros(3)
    names = list(PALETTE)
    things: list[Thing] = []
    for value, name in enumerate(names):
        if value != ground:
            for region in _regions(labels == value):
                things += _things_at(image, region, name, base)
    return Scene(names[ground], tuple(things))


def explained(image: np.ndarray) -> float:
    """The share of pixels that the background and the readable objects explain: image (H, W, 3) in [0, 1].

    1 for a drawn scene, 0.9 and more for a good generated picture, far less for coloured noise. A pixel is explained
    where the picture is within 0.25 of the scene that `read` finds in it, drawn anew without its blobs, or within two
    pixels of an object's outline.
    """
    scene = read(image)
    pure = tuple(thing for thing in scene.things if thing.shape in SHAPES and thing.color in COLORS)
    near = np.abs(image - render(Scene(scene.background, pure), image.shape[0])).max(-1) < TOLERANCE
    outlines = [_outline(thing, image.shape[0]) for thing in pure]
    return float(np.logical_or.reduce([near, *outlines]).mean())


def _outline(thing: Thing, size: int) -> np.ndarray:
    inside = coverage(thing.shape, thing.x, thing.y, thing.r, size) >= 0.5
    grown = ndimage.binary_dilation(inside, BLOCK, OUTLINE)
    return grown & ~ndimage.binary_erosion(inside, BLOCK, OUTLINE)


def _nearest(image: np.ndarray, palette: np.ndarray) -> np.ndarray:
    return np.square(image[:, :, None] - palette).sum(-1).argmin(-1)


def _ground(labels: np.ndarray) -> int:
    """The index of the background that most of the border has."""
    border = np.concatenate([labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(), labels[:, -2:].ravel()])
    return int(np.bincount(border[border < len(BACKGROUNDS)], minlength=len(BACKGROUNDS)).argmax())


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions that survive an opening: the mixed pixels along an edge do not."""
    core = ndimage.binary_opening(mask, BLOCK)
    marks, count = ndimage.label(core)
    regions = [marks == i + 1 for i in range(count)]
    return [region for region in regions if region.sum() >= MIN_AREA]


def _things_at(image: np.ndarray, region: np.ndarray, name: str, base: np.ndarray) -> list[Thing]:
    """The object of a region, or the several that touch in it."""
    cover = _cover(image, region, base)
    color = name if name in COLORS else "mixed"
    whole, fit = _best_shape(cover)
    if fit >= MIN_FIT or color == "mixed":
        return [Thing(whole[0] if fit >= MIN_FIT else "blob", color, *whole[1:])]
    parts = _touching(cover) or [("blob", *whole[1:])]
    return [Thing(part[0], color, *part[1:]) for part in parts]


def _cover(image: np.ndarray, region: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The share of each pixel near a region that has the region's colour rather than the background's, in [0, 1]."""
    near = ndimage.binary_dilation(region, BLOCK, iterations=2)
    inside = ndimage.binary_erosion(region) if ndimage.binary_erosion(region).any() else region
    tone = np.median(image[inside], axis=0) - base
    return ((image - base) @ tone / max(tone @ tone, 1e-6)).clip(0, 1) * near


Part = tuple[str, float, float, float]  # shape, x, y, r


def _best_shape(cover: np.ndarray) -> tuple[Part, float]:
    """The ideal shape of the cover's area and centre that overlaps it best, and how well: intersection over union."""
    area = cover.sum()
    y, x = ndimage.center_of_mass(cover) if area > 0 else (0.0, 0.0)
    fits = []
    for shape, unit_area in SHAPES.items():
        r = float(np.sqrt(area / unit_area))
        ideal = coverage(shape, x + 0.5, y + 0.5, r, cover.shape[0])
        fits.append((_overlap(cover, ideal), shape, r))
    fit, shape, r = max(fits)
    return (shape, float(x) + 0.5, float(y) + 0.5, r), fit


def _overlap(cover: np.ndarray, ideal: np.ndarray) -> float:
    return float(np.minimum(cover, ideal).sum() / max(np.maximum(cover, ideal).sum(), 1e-6))


def _touching(cover: np.ndarray) -> list[Part]:
    """The fewest objects into which a cover can be cut so that each fits a shape; none where there are none."""
    pixels = _Pixels.of(cover)
    for count in range(2, min(MOST_PARTS, int(pixels.weight.sum() / MIN_PART_AREA)) + 1):
        for circles in (pixels.deepest(count), pixels.along(count)):
            owner = pixels.cut(circles)
            parts, fits = zip(*(_best_shape(pixels.part(cover, owner == i)) for i in range(count)), strict=True)
            if min(fits) >= MIN_PART_FIT:
                return list(parts)
    return []


@dataclass(frozen=True)
class _Pixels:
    """The pixels of a cover, to be shared out among circles, (count, 3) as (x, y, r)."""

    place: np.ndarray  # (N, 2), x and y
    weight: np.ndarray  # (N,) in (0, 1]
    depth: np.ndarray  # (N,), pixels from the edge

    @classmethod
    def of(cls, cover: np.ndarray) -> "_Pixels":
        y, x = np.nonzero(cover)
        depth = ndimage.distance_transform_edt(cover > 0.5)
        return cls(np.stack([x, y], 1).astype(float), cover[y, x], depth[y, x])

    def part(self, cover: np.ndarray, mine: np.ndarray) -> np.ndarray:
        x, y = self.place[mine].astype(int).T
        part = np.zeros_like(cover)
        part[y, x] = self.weight[mine]
        return part

    def deepest(self, count: int) -> np.ndarray:
        """Circles far inside and far apart."""
        chosen = [int(self.depth.argmax())]
        r = np.sqrt(self.weight.sum() / count / np.pi)
        for _ in range(count - 1):
            apart = np.min([np.hypot(*(self.place - self.place[i]).T) for i in chosen], axis=0)
            chosen.append(int((self.depth * (apart > r)).argmax()))
        return np.column_stack([self.place[chosen], self.depth[chosen]])

    def along(self, count: int) -> np.ndarray:
        """Equal circles along the longest axis."""
        middle = np.average(self.place, axis=0, weights=self.weight)
        axis = np.linalg.svd(self.place - middle, full_matrices=False)[2][0]
        places = np.quantile((self.place - middle) @ axis, (np.arange(count) + 0.5) / count)
        r = np.sqrt(self.weight.sum() / count / np.pi)
        return np.column_stack([middle + places[:, None] * axis, np.full(count, r)])

    def cut(self, circles: np.ndarray, rounds: int = 8) -> np.ndarray:
        """The circle (N,) that owns each pixel: it goes to the one in which it is deepest, and they go to theirs."""
        for _ in range(rounds):
            x, y, r = circles.T
            distance = np.hypot(self.place[:, :1] - x, self.place[:, 1:] - y) - r
            owner = distance.argmin(1)
            area = np.bincount(owner, self.weight, len(circles))
            sums = [np.bincount(owner, self.weight * axis, len(circles)) for axis in self.place.T]
            circles = np.stack([*(total / np.maximum(area, 1e-6) for total in sums), np.sqrt(area / np.pi)], 1)
        return owner
