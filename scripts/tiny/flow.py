"""Stage `flow`: `tiny-flow`, flow matching, fine-tuned from `tiny`."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from scripts.tiny import clip, scenes, unet
from scripts.tiny.fit import Fit, Setup

LOGIT = 0.3, 1.0  # mean and deviation of logit(t)
SHIFT = 3.0  # of the scheduler's levels


def trained(setup: Setup, steps: int = 3000) -> UNet2DConditionModel:
    """The features are `tiny`'s; the target and the clock change."""
    model = unet.make(setup, "flow")
    model.load_state_dict(unet.trained(setup).state_dict())
    model.train()
    network = setup.compiled(model)
    Fit(setup, "flow", {"unet": model}, lambda step: flow_loss(network, setup, step), steps, 1e-3).run()
    return model.eval()


def flow_loss(network: nn.Module, setup: Setup, step: int) -> Tensor:
    """|v - (eps - x0)|^2 at x = (1 - t) x0 + t eps (https://arxiv.org/abs/2210.02747), t logit-normal."""
    z, ids = scenes.latents(setup, step).draw(setup.batch, setup)
    t = torch.sigmoid(LOGIT[0] + LOGIT[1] * torch.randn(len(z), device=z.device))
    share, eps = t.view(-1, 1, 1, 1), torch.randn_like(z)
    with torch.no_grad():
        states = clip.text_encoder(setup)(ids).last_hidden_state
    x = ((1 - share) * z + share * eps).contiguous(memory_format=torch.channels_last)
    with unet.half(setup):
        v = network(x, 1000 * t, states).sample
    return (v.float() - (eps - z)).square().mean()
