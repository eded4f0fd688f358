# %% [markdown]
# # Your own reward, your own guidance method
#
# ## A reward
#
# A function of images, a tensor (B, 3, H, W) in [0, 1], and B prompts, that gives B scores. Say whether a gradient goes
# through it.

# %%
from dataclasses import dataclass

from difftune import AlignPropConfig, ReNO, attach, load_model, search, train
from guidance import Branch, Guided, time


def warm(images, prompts):
    """More red than blue."""
    return images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2))


warm.differentiable = True

# %% [markdown]
# It works wherever a reward does: in noise optimisation, in search, in training. Saved in `mine.py`, it is `--reward
# mine:warm` on the command line.

# %%
better = ReNO(load_model("tiny-turbo"), warm, progress=False).optimize(["a circle"], iterations=8)
print(f"noise: {float(better.rewards_before):.3f} -> {float(better.rewards):.3f}")
best = search(
    load_model("tiny"),
    ["a circle"],
    method="best-of-n",
    reward=warm,
    nfe_budget=80,
    num_inference_steps=10,
    progress=False,
).run()
print(f"search: {float(best.rewards):.3f}")

# %% [markdown]
# ## A guidance method
#
# A frozen dataclass with one generator: it asks for evaluations of the network, is sent the answers, and returns what
# the sampler follows.

# %%


@dataclass(frozen=True)
class Fading:
    """CFG whose scale fades towards the data: w = 1 + (scale - 1) tau^power, tau from 1 to 0."""

    scale: float = 7.5
    power: float = 1.0
    space = "any"

    def guide(self, path, at):
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        return Guided(u + (1 + (self.scale - 1) * time(at) ** self.power) * (c - u))


pipe = load_model("tiny")
with attach(pipe, Fading(6.0)) as handle:
    image = pipe("a red circle left of a blue square", num_inference_steps=10).images[0]
print("evaluations:", handle.branches)

# %% [markdown]
# ## Both, in a training loop of your own
#
# `train` gives metrics and state after each optimiser step; the loop is yours. On the command line it would be
# `difftune train alignprop --guidance mine:Fading --reward mine:warm`.

# %%
config = AlignPropConfig(
    max_train_steps=4, train_batch_size=4, num_inference_steps=5, truncation_max=2, guidance="none"
)
for metrics, _ in train(config, reward=warm):
    print(f"step {metrics['step']:.0f}: {metrics['reward_mean']:.3f}")

# %% [markdown]
# ## On a real model
#
# Only the names of the models change; the reward and the method stay as they are:
#
# ```python
# import torch
#
# pipe = load_model("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")                    # SD 1.5
# pipe = load_model("stabilityai/stable-diffusion-xl-base-1.0").to("cuda")                       # SDXL
# pipe = load_model("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")       # FLUX
# ```
