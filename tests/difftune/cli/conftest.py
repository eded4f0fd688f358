"""A small random pipeline in a folder, and a picture."""

import numpy as np
import pytest
from PIL import Image

from tests.support.pipelines import sd


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((16, 16, 3), 51, np.uint8)).save(path)
    return str(path)
