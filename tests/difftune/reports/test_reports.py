"""Sheets whose labels can be read, and figures with a band."""

from io import BytesIO

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from PIL import Image

from difftune.reports import figures, sheets
from difftune.reports.sheets import LARGEST, SIDE, SMALLEST, Cell


def picture(gray, side=8):
    return np.full((side, side, 3), gray)


@pytest.mark.parametrize(("side", "shown"), [(8, SIDE), (64, SIDE), (100, 100), (512, 512)])
def test_small_pictures_are_enlarged_and_large_ones_are_left(side, shown):
    made = sheets.block(Cell([picture(0.5, side)] * 3, columns=2))
    assert made.size == (2 * shown + sheets.GAP, 2 * shown + sheets.GAP)


def test_a_caption_is_as_large_as_its_cell_allows():
    assert sheets.fitting(["a"], 512).size == LARGEST
    long = "scale 0.58 (CFG 7.5), 50 NFE"
    fitted = sheets.fitting([long], 256)
    assert SMALLEST < fitted.size < LARGEST and fitted.getlength(long) <= 256 < sheets.font(fitted.size + 1).getlength(
        long
    )


def test_what_is_counted_has_whole_numbers_on_its_axis():
    """A curve of two iterations has no iteration 0.2."""
    figure, [axes] = figures.panels(["reward"], "iteration")
    figures.draw(axes, [0, 1], [0.1, 0.2])
    figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_an_empty_place_stays_white_and_each_row_has_its_name():
    made = np.asarray(
        Image.open(BytesIO(sheets.sheet([("cfg", [Cell([picture(0.5)], "one"), None]), ("apg", [None, None])])))
    )
    left = made.shape[1] - sheets.MARGIN - 2 * SIDE - LARGEST
    assert (made[:SIDE, left + SIDE :] == 255).all()
    assert (made[:SIDE, :left] < 128).any() and (made[SIDE + 2 * LARGEST :, :left] < 128).any()


def test_the_band_holds_four_of_five_samples_and_a_short_one_counts_as_it_ended():
    _, [axes] = figures.panels(["reward"], "iteration")
    figures.draw_samples(axes, [[float(i), float(i) + 1] for i in range(10)] + [[10.0]])
    [band] = [c for c in axes.collections if isinstance(c, PolyCollection)]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((1.0, 10.0))
    assert axes.lines[0].get_ydata() == pytest.approx([5.0, 65 / 11])


def test_smoothing_is_the_mean_of_the_last_tenth():
    assert figures.smoothed(list(range(20)))[:3] == [0, 0.5, 1.5]
    assert figures.smoothed([3.0]) == [3.0]


def test_a_long_name_is_wrapped_and_cut():
    name = "a red circle left of a blue square on a black background " * 4
    lines = sheets.wrapped(name).splitlines()
    assert len(lines) == sheets.LINES and max(map(len, lines)) <= sheets.LETTERS and lines[-1].endswith(" ...")
    assert sheets.wrapped("interval:cfg") == "interval:cfg"


def test_a_verdict_of_yes_or_no_has_no_band():
    _, axes = figures.panels(["oracle", "reward"], "iteration")
    for each, end in zip(axes, (1.0, 0.5), strict=True):
        figures.draw_samples(each, [[0.0, 1.0], [0.0, end]])
    assert [len(each.collections) for each in axes] == [0, 1]


def test_the_held_out_curve_and_the_shade_are_told_apart():
    _, axes = figures.panels(["held out"], "iteration")
    figures.shade(axes, 1, 2)
    figures.draw(axes[0], [0, 1, 2], [0, 1, 0], figures.HELD)
    assert axes[0].patches[0].get_facecolor()[:3] != to_rgb(axes[0].lines[0].get_color())
