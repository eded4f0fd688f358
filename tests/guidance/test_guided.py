"""guided(): evaluations are counted, shared and skipped; what a method sees, and what a gradient can reach."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from guidance.branches import Counter
from guidance.contract import Branch, Combined, Guided, Preds, convert, drive
from guidance.guided import guided
from guidance.methods.catalogue import CFG, Plain
from solvers.denoiser import SPACES, Path, Prediction, predicted
from solvers.noise import cosine, flow, noise

B, D = 3, 5
LEVELS = {"vp": cosine(0.6), "ve": noise(1.0, 3.0), "flow": flow(0.4), "pure noise": flow(1.0), "data": flow(0.0)}


class Linear(nn.Module):
    """A network: u = weight * x + mean, its calls written down."""

    def __init__(self, prediction_type="flow"):
        super().__init__()
        self.prediction_type, self.calls = prediction_type, []
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.tensor(0.1), requires_grad=False)

    def forward(self, x, at, cond):
        self.calls.append(len(x))
        return predicted("flow", x, at, self.weight * x + cond["mean"])

    def patched(self, name):
        raise ValueError(f"no patch {name!r}")


def conds(**more) -> dict:
    g = torch.Generator().manual_seed(0)
    return {name: {"mean": torch.randn(B, D, generator=g), **more} for name in ("cond", "uncond")}


def start() -> Path:
    return Path(torch.randn(B, D, generator=torch.Generator().manual_seed(1)))


def u(p: Prediction) -> Tensor:
    return p.eps - p.x0


@dataclass(frozen=True)
class Ask:
    """Yields one request after the other and returns what `combine` makes of the answers."""

    requests: tuple
    combine: object
    space: str = "any"

    def guide(self, path, at):
        for request in self.requests:
            preds = yield request
        return self.combine(preds)


@pytest.mark.parametrize("at", LEVELS.values(), ids=LEVELS)
def test_cfg_by_hand(at):
    net, given, path = Linear(), conds(), start()
    c, un = (u(net(path.x, at, given[name])) for name in ("cond", "uncond"))
    p = guided(net, CFG(3.0), given)(path, at)
    torch.testing.assert_close(u(p), un + 3 * (c - un))
    torch.testing.assert_close((at.alpha * p.x0 + at.sigma * p.eps).float(), path.x)


def test_branches_share_a_forward_where_they_can():
    net, counter = Linear(), Counter()
    predict = guided(net, CFG(), conds(), counter=counter)
    predict(start(), flow(0.5))
    assert net.calls == [2 * B] and predict.nfe == counter.rows == 2 * B and counter.calls == 1
    assert predict.branches == {"cond": B, "uncond": B}
    shorter = conds()
    shorter["uncond"] = {**shorter["uncond"], "more": torch.zeros(B, 2)}
    guided(net, CFG(), shorter, counter=counter)(start(), flow(0.5))
    assert net.calls[1:] == [B, B] and counter.rows == 4 * B


def test_rows_are_skipped():
    rows = torch.tensor([True, False, True])
    request = {"some": Branch("cond", rows=rows), "none": Branch("uncond", rows=torch.zeros(B, dtype=torch.bool))}
    seen: list[Preds] = []

    def combine(p):
        seen.append(p)
        return Guided(torch.where(rows[:, None], p["some"], p["all"]))

    net, given = Linear(), conds()
    predict = guided(net, Ask((request, {"all": Branch("uncond")}), combine), given)
    p = predict(start(), flow(0.5))
    assert net.calls == [2, 3] and predict.nfe == 5 and predict.branches == {"some": 2, "all": 3}
    assert torch.equal(seen[0]["some"].isnan().any(1), ~rows) and seen[0]["none"].isnan().all()
    for i, name in enumerate(("cond", "uncond", "cond")):
        torch.testing.assert_close(u(p)[i], u(net(start().x, flow(0.5), given[name]))[i])


def test_all_rows_are_the_whole_batch():
    whole = Ask(({"it": Branch("cond", rows=torch.ones(B, dtype=torch.bool))},), lambda p: Guided(p["it"]), "x0")
    net, given = Linear(), conds()
    torch.testing.assert_close(
        guided(net, whole, given)(start(), flow(0.5)).x0, net(start().x, flow(0.5), given["cond"]).x0
    )


def test_a_condition_of_its_own_overrides():
    net, given = Linear(), conds()
    other = torch.full((B, D), 2.0)
    p = guided(net, Ask(({"it": Branch({"mean": other})},), lambda p: Guided(p["it"])), given)(start(), flow(0.5))
    torch.testing.assert_close(u(p), u(net(start().x, flow(0.5), {"mean": other})))


def test_weak_network():
    net, weak, given = Linear(), Linear(), conds()
    weak.weight.data.fill_(-1.0)
    method = Ask(({"c": Branch("cond"), "w": Branch("cond", network="weak")},), lambda p: Guided(2 * p["c"] - p["w"]))
    predict = guided(net, method, given, weak=weak)
    expected = 2 * u(net(start().x, flow(0.5), given["cond"])) - u(weak(start().x, flow(0.5), given["cond"]))
    torch.testing.assert_close(u(predict(start(), flow(0.5))), expected)
    assert predict.nfe == 2 * B


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("at", LEVELS.values(), ids=LEVELS)
def test_an_affine_method_does_not_depend_on_the_space(space, at):
    """Also where a conversion is singular: the result is then finite, and the reference branch."""
    net, given, path = Linear(), conds(), start()
    method = Ask(CFG_REQUEST, lambda p: Guided(p["uncond"] + 3 * (p["cond"] - p["uncond"])), space)
    ours, cfg = guided(net, method, given)(path, at), guided(net, CFG(3.0), given)(path, at)
    singular = {"x0": at.sigma, "eps": at.alpha}.get(space, torch.ones(())) == 0
    expected = net(path.x, at, given["cond"]) if singular else cfg
    torch.testing.assert_close(u(ours), u(expected), rtol=1e-5, atol=1e-5)


CFG_REQUEST = ({"cond": Branch("cond"), "uncond": Branch("uncond")},)


@pytest.mark.parametrize("a", SPACES)
@pytest.mark.parametrize("b", SPACES)
@pytest.mark.parametrize("at", list(LEVELS.values())[:3], ids=list(LEVELS)[:3])
def test_convert(a, b, at):
    """Every space says the same (x0, eps), and converting forth and back is the identity."""
    x, out = start().x.double(), start().x.double().flip(0)
    there = convert(out, a, b, x, at)
    torch.testing.assert_close(predicted(b, x, at, there), predicted(a, x, at, out))
    torch.testing.assert_close(convert(there, b, a, x, at), out)


def test_measuring_touches_nothing():
    def combine(p):
        assert p.to("cond", "x0").dtype == torch.float32 == p.to("cond", "eps").dtype
        return Guided(p["cond"])

    given, path, at = conds(), start(), flow(0.5)
    measured = guided(Linear(), Ask(CFG_REQUEST, combine), given)(path, at)
    assert torch.equal(u(measured), u(guided(Linear(), Ask(CFG_REQUEST, lambda p: Guided(p["cond"])), given)(path, at)))


@pytest.mark.parametrize("space", ("any", "x0", "eps", "v", "flow", "output"))
def test_shift_is_the_difference_of_clean_data(space):
    net, given, path, at = Linear("v"), conds(), start(), cosine(0.5)
    method = Ask(CFG_REQUEST, lambda p: Guided(p["uncond"], data=p["cond"]), space)
    p = guided(net, method, given)(path, at)
    x0 = {name: net(path.x, at, given[name]).x0 for name in given}
    torch.testing.assert_close(p.shift, x0["cond"] - x0["uncond"])
    torch.testing.assert_close(p.x0, x0["uncond"])


def test_low_precision_answers_are_converted_in_float32_and_returned_in_their_own():
    raw = torch.randn(B, D).bfloat16()
    method = Ask(({"cond": Branch("cond")},), lambda p: Guided(p["cond"] + 0), "x0")
    made = drive(method, lambda request: {"cond": raw}, start(), cosine(0.5), "eps", "eps")
    assert isinstance(made, Combined) and made.out.dtype == torch.bfloat16 and torch.equal(made.out, raw)


def test_tensors():
    net, given, scale = Linear(), conds(), torch.ones(B, requires_grad=True)
    predict = guided(net, CFG(scale), given, weak=net)
    expected = [given["cond"]["mean"], given["uncond"]["mean"], scale, net.weight]
    assert [id(t) for t in predict.tensors] == [id(t) for t in expected]
    u(predict(start(), flow(0.5))).sum().backward()
    assert scale.grad.abs().sum() > 0 and net.weight.grad.abs() > 0


def test_float64_stays():
    given = {name: {"mean": cond["mean"].double()} for name, cond in conds().items()}
    assert guided(Linear(), CFG(), given)(Path(start().x.double()), flow(0.5)).x0.dtype == torch.float64


class Unasked:
    """A method whose `guide` is no generator."""

    space = "any"

    def guide(self, path, at):
        return Guided(path.x)


def test_errors():
    ask = {
        "no condition 'cat'; given: cond, uncond": Ask(({"it": Branch("cat")},), None),
        r"pass guided\(..., weak=": Ask(({"it": Branch("cond", network="weak")},), None),
        "no patch 'pag'": Ask(({"it": Branch("cond", patch="pag")},), None),
        "leave rows=None in one": Ask(
            ({"it": Branch("cond", rows=torch.tensor([True, False, True]))},), lambda p: Guided(p["it"]), "x0"
        ),
        r"Ask.guide returned Tensor: return Guided\(prediction\)": Ask(({"it": Branch("cond")},), lambda p: p["it"]),
        r"a prediction of shape \(\), and x has \(3": Ask(({"it": Branch("cond")},), lambda p: Guided(p["it"].mean())),
        "reads 'uncond' of its answers, and asked for it": Ask(
            ({"it": Branch("cond")},), lambda p: Guided(p["uncond"])
        ),
        "asks for 'it' by a str: yield Branch objects": Ask(({"it": "cond"},), None),
        "yields a Branch: yield a dictionary": Ask((Branch("cond"),), None),
        "has space 'nowhere'; known: eps": Ask(({"it": Branch("cond")},), None, "nowhere"),
    }
    for message, method in ask.items():
        with pytest.raises(ValueError, match=message):
            guided(Linear(), method, conds())(start(), flow(0.5))
    with pytest.raises(ValueError, match="Unasked.guide has no yield: ask for what it needs"):
        guided(Linear(), Unasked(), conds())(start(), flow(0.5))
    with pytest.raises(ValueError, match="conds has no 'cond'; given: uncond"):
        guided(Linear(), Plain(), {"uncond": {}})


def test_a_gradient_may_be_asked_for_of_the_conditions_that_it_was_given_last():
    one, other = (torch.ones(1, 2, requires_grad=True) for _ in range(2))
    predict = guided(Linear(), Plain(), {"cond": {"mean": one}})
    ids = set(map(id, replace(predict, conds={"cond": {"mean": other}}).tensors))
    assert id(other) in ids and id(one) not in ids and len(ids) == 2  # and the weight
