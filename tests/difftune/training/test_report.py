"""The page of a training folder."""

import base64
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from difftune import AlignPropConfig, train_in_folder
from difftune.training import report
from tests.support.browsers import check_widths
from tests.support.pipelines import sd

SETTINGS = {"reward": ["brightness"], "max_train_steps": 2, "train_batch_size": 2, "num_inference_steps": 2}
SETTINGS |= {"learning_rate": 0.1, "truncation_max": 2, "model": "mine"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    held = {"validation_steps": 1, "validation_reward": "contrast", "num_validation_images": 2}
    train_in_folder(AlignPropConfig(output_dir=str(folder), **SETTINGS, **held), pipe=sd())
    return (folder / "report.html").read_text()


def pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(BytesIO(base64.b64decode(data)))) for data in found]


def test_it_shows_curves_and_pictures_before_and_after(page):
    _, *pairs = pictures(page)
    assert len(pairs) == 4 and page.count("<figcaption>") == 2
    for before, after in (pairs[:2], pairs[2:]):
        assert np.abs(before.astype(int) - after).max() > 8  # a learning rate of 0.1


def test_it_says_what_was_gained_how_and_with_what_settings(page):
    for text in ("alignprop: mine on brightness", "held out, before and after", "difftune train alignprop --config"):
        assert text in page
    assert '<td class="changed">learning_rate</td><td class="changed">0.1</td>' in page
    assert "<td>rank</td><td>4</td>" in page
    assert "http" not in page and not re.search(r'(src|href)="(?!data:)', page)


def test_without_a_validation_it_says_how_to_get_pictures(tmp_path):
    train_in_folder(AlignPropConfig(output_dir=str(tmp_path / "out"), **SETTINGS), pipe=sd())
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(pictures(page)) == 1 and "--validation_steps" in page


def test_where_the_held_out_reward_leaves_is_marked():
    checks = [
        {"step": 10 * i, "reward_mean": float(i), "held_out_mean": -abs(i - 8.0) + 0.01 * (-1) ** i} for i in range(30)
    ]
    found = report.parted(checks)
    assert found is not None and 6 <= found.best <= 10
    assert report.parted([{"step": 1, "reward_mean": 1.0}]) is None


@pytest.mark.browser
def test_it_is_no_wider_than_its_window(page, tmp_path, browser):
    (tmp_path / "report.html").write_text(page)
    check_widths(browser, (tmp_path / "report.html").as_uri())
