"""HTML pages of one style, each one file with its pictures inside."""

import base64
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from difftune.reports.sheets import as_picture, as_png


@cache
def environment() -> Environment:
    """The templates of this folder; `picture` is a filter of arrays (H, W, 3) in [0, 1], `data` one of PNG bytes."""
    made = Environment(loader=PackageLoader("difftune.reports"), autoescape=True, undefined=StrictUndefined)
    made.filters |= {"picture": picture, "data": data}
    return made


def render(template: str, **values: Any) -> str:
    """The page of a template as HTML."""
    return environment().get_template(template).render(**values)


def picture(image: Any) -> str:
    """A picture (H, W, 3) in [0, 1] as a data URI."""
    return data(as_png(as_picture(image)))


def data(content: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
