"""A guidance method of one's own: its imports, its name on the command line, and what is said where it is none."""

import sys

import pytest

import guidance
from difftune.errors import UserError
from difftune.lookup import guidance_field, guidance_named
from guidance import CFG, NASA, PAG, Branch, CFGpp, Guided, Interval
from guidance.attach import attach
from guidance.guided import guided
from guidance.methods import scales
from guidance.methods.ahead import end_of_step
from guidance.methods.scales import UnusualScale
from tests.support import pipelines

MODULE = '''
from dataclasses import dataclass
from guidance import Branch, Guided

@dataclass(frozen=True)
class Mean:
    """The mean of the two."""
    share: float = 0.5
    space = "any"

    def guide(self, path, at):
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        return Guided(preds["uncond"] + self.share * (preds["cond"] - preds["uncond"]))

class NoMethod:
    pass
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_class_of_the_working_folder_is_named(module):
    method = guidance_named("own_method:Mean", options={"share": 0.25})
    assert type(method).__name__ == "Mean" and method.share == 0.25
    within = guidance_named("interval:own_method:Mean", options={"high": 3.0, "share": 0.75})
    assert isinstance(within, Interval) and within.high == 3.0 and within.method.share == 0.75
    assert guidance_field("interval:own_method:Mean", "share") == (1, "share")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_method:Nothing", "the module 'own_method' has no 'Nothing', which the guidance"),
        ("own_method:NoMethod", "'own_method:NoMethod' is not a guidance method: write a frozen dataclass with space"),
        ("intervall:apg", "no guidance method 'intervall' .did you mean 'interval'"),
        ("own_method", "no guidance method 'own_method'"),
        ("no such:Mean", "no guidance method 'no such'"),
    ],
)
def test_what_is_no_method_is_one_sentence(module, name, sentence):
    with pytest.raises(UserError, match=sentence):
        guidance_named(name)


class Spaceless:
    def guide(self, path, at):
        yield {"cond": Branch("cond")}


def test_an_object_that_is_no_method_is_refused_at_once():
    with pytest.raises(UserError, match="Spaceless is not a guidance method, it has no space: a method has space"):
        attach(pipelines.sd(), Spaceless())
    with pytest.raises(UserError, match="CFG is a class: make a guidance method of it, as in CFG()"):
        guided(lambda *_: None, CFG, {"cond": {}})


def test_names_are_had_from_the_package():
    assert guidance.APG(8.0).scale == 8.0 and Guided(0).data is None and guidance.end_of_step is end_of_step
    with pytest.raises(AttributeError, match="guidance has no 'Nothing'; it has .*Branch, "):
        guidance.Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("make", "conversion"),
    [
        (
            lambda: CFGpp(7.5),
            r"CFGpp was given scale 7.5, .* from 0 to 1: it is not CFG's scale; .*from_cfg_scale\(7.5\), which is 0.6",
        ),
        (lambda: NASA(7.5), "NASA was given scale 7.5, and is used from 0 to 1"),
        (lambda: PAG(20.0), "PAG was given scale 20, and is used from 0 to 15: it multiplies c - weak"),
        (lambda: CFG(-2.0), r"CFG was given scale -2, .* a paper's c \+ s \(c - u\) is scale 1 \+ s"),
    ],
)
def test_a_scale_of_another_convention_is_told_once(make, conversion, monkeypatch, recwarn):
    monkeypatch.setattr(scales, "_told", set())
    with pytest.warns(UnusualScale, match=conversion) as warned:
        make()
    assert warned[0].filename == __file__  # the line that made the method
    recwarn.clear()
    make()
    assert not [w for w in recwarn if w.category is UnusualScale]


def test_a_usual_scale_and_one_that_was_converted_are_not_told(monkeypatch, recwarn):
    monkeypatch.setattr(scales, "_told", set())
    CFGpp(0.6), CFGpp(1.0), CFG(1.0), CFGpp.from_cfg_scale(25.0)
    assert not [w for w in recwarn if w.category is UnusualScale]
