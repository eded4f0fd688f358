"""Levels and clocks against diffusers' own tables."""

import diffusers
import pytest
import torch

from solvers.levels import READERS, Clock, levels_of, prediction_type
from solvers.noise import log_snr, noise, vp

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers under numpy 2

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOWS = [name for name in READERS if name.startswith("FlowMatch") or name == "SCMScheduler"]
ASKED = {"SCMScheduler": {"intermediate_timesteps": None}}  # it has one for two steps alone
DIFFUSIONS = [name for name in READERS if name not in FLOWS]


def scheduler(name, **config):
    return getattr(diffusers, name)(**({} if name in FLOWS else SD), **config)


@pytest.mark.parametrize("name", READERS)
def test_levels_walk_down_to_data_in_the_networks_coordinates(name):
    s = scheduler(name)
    steps = 4 if name in ("LCMScheduler", "TCDScheduler") else 10
    levels = levels_of(s, steps, **ASKED.get(name, {}))
    alphas, sigmas = (torch.stack(values) for values in zip(*levels, strict=True))
    assert len(levels) == steps + 1 and all(at.alpha.dtype == torch.float64 for at in levels)
    assert (sigmas[:-1].diff() < 0).all() and (alphas[:-1].diff() > 0).all()
    assert sigmas[-1] <= sigmas[-2]  # PNDM ends on t = 0 twice: offset 0 and set_alpha_to_one=False
    unit = alphas + sigmas if name in FLOWS else alphas**2 + sigmas**2
    torch.testing.assert_close(unit, torch.ones_like(unit), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", READERS)
def test_reading_changes_nothing_and_wants_a_run(name):
    s = scheduler(name)
    before = s.timesteps
    levels = levels_of(s, 4, **ASKED.get(name, {}))
    assert s.timesteps is before
    s.set_timesteps(4, **ASKED.get(name, {}))
    assert levels_of(s) == levels


def test_no_run_yet():
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        with pytest.raises(ValueError, match="set_timesteps"):
            levels_of(scheduler(name))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("to_one", [True, False])
def test_tables(name, spacing, to_one):
    skip = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    s = scheduler(name, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=to_one, **skip)
    s.set_timesteps(10)
    levels = levels_of(s)
    timesteps = s.timesteps.unique().flip(0)  # PNDM repeats one
    assert levels[:-1] == [vp(s.alphas_cumprod[t]) for t in timesteps]
    assert levels[-1] == vp(1.0 if to_one else s.alphas_cumprod[0])
    assert [Clock(s)(at).item() for at in levels[:-1]] == timesteps.tolist()


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_final_sigma(name, final):
    s = scheduler(name, final_sigmas_type=final)
    last = levels_of(s, 5)[-1]
    k = 0 if final == "zero" else ((1 - s.alphas_cumprod[0]) / s.alphas_cumprod[0]).sqrt().item()
    assert (last.sigma / last.alpha).item() == pytest.approx(k, rel=1e-6)


def test_shift():
    plain, shifted = (scheduler("FlowMatchEulerDiscreteScheduler", shift=s) for s in (1.0, 3.0))
    for a, b in zip(levels_of(plain, sigmas=[1.0, 0.6, 0.2]), levels_of(shifted, sigmas=[1.0, 0.6, 0.2]), strict=True):
        assert b.sigma.item() == pytest.approx((3 * a.sigma / (1 + 2 * a.sigma)).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_flow_sigmas(name):
    s = scheduler(name, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    at = levels_of(s, 5)[2]
    assert prediction_type(s) == "flow" and (at.alpha + at.sigma).item() == pytest.approx(1)
    assert Clock(s)(at).item() == pytest.approx(1000 * at.sigma.item())


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_clock_is_exact_on_the_table(name):
    s = scheduler(name)
    clock = Clock(s)
    for t in (0, 1, 2, 17, 500, 981, 998, 999):
        assert clock(vp(s.alphas_cumprod[t])).item() == t
        k = ((1 - s.alphas_cumprod[t]) / s.alphas_cumprod[t]) ** 0.5  # as Euler and DPM++ keep it, in float32
        assert clock(noise(1.0, k)).item() == t


def test_clock_between_and_beyond():
    s = scheduler("DDIMScheduler")
    clock = Clock(s)
    low, high = (log_snr(vp(s.alphas_cumprod[t])) for t in (500, 501))
    assert clock(noise(1.0, (-(0.7 * low + 0.3 * high)).exp())).item() == pytest.approx(500.3, abs=1e-4)
    ts = [clock(noise((1 - q).sqrt(), q.sqrt())).item() for q in torch.linspace(0, 1, 300, dtype=torch.float64)]
    assert ts == sorted(ts) and ts[0] == 0 and ts[-1] == 999


def test_clock_at_zero_terminal_snr():
    s = scheduler("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    levels = levels_of(s, 10)
    assert levels[0].alpha == 0 and Clock(s)(levels[0]) == 999


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_flow_clock_is_bit_equal(name):
    s = scheduler(name, shift=3.0)
    s.set_timesteps(28)
    assert torch.equal(torch.stack([Clock(s)(at) for at in levels_of(s)[:-1]]), s.timesteps)


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "linspace"}])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_own_clock_is_bit_equal(name, config):
    s = scheduler(name, **config)
    s.set_timesteps(12)
    said = torch.stack([Clock(s, own=True)(at) for at in levels_of(s)[:-1]])
    assert torch.equal(said, s.timesteps.float())
    plain = torch.stack([Clock(s)(at) for at in levels_of(s)[:-1]])
    torch.testing.assert_close(plain, said, rtol=0, atol=0.51)


def test_prediction_types():
    for theirs, ours in {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}.items():
        assert prediction_type(scheduler("DDIMScheduler", prediction_type=theirs)) == ours
    assert prediction_type(scheduler("FlowMatchEulerDiscreteScheduler")) == "flow"


def test_what_is_not_supported_is_named():
    for call in (lambda s: levels_of(s, 4), Clock):
        with pytest.raises(ValueError, match="EDMEulerScheduler.*DDIMScheduler"):
            call(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="invert_sigmas"):
        levels_of(scheduler("FlowMatchEulerDiscreteScheduler", invert_sigmas=True), 4)
    with pytest.raises(ValueError, match="continuous"):
        Clock(scheduler("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="no clock of its own"):
        Clock(scheduler("HeunDiscreteScheduler"), own=True)
