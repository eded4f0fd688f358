# %% [markdown]
# # Guide a pipeline
#
# Swap the guidance of a diffusers pipeline that you already have. Everything else of it stays as it is.

# %%
from pathlib import Path

import torch

from difftune import APG, CFG, CFGpp, Interval, attach, load_model, load_reward
from difftune.reports.sheets import Cell, sheet

OUT = Path("out/guide")
OUT.mkdir(parents=True, exist_ok=True)
pipe = load_model("tiny")
pipe.set_progress_bar_config(disable=True)
PROMPTS = ["a red circle left of a blue square", "two green triangles on a black background"]

# %% [markdown]
# Inside the `with` block the pipeline follows the method; after it, it is the stock pipeline again, bit for bit.
# `noise` is the same for every method.

# %%
METHODS = {
    "CFG 3": CFG(3.0),
    "CFG 8": CFG(8.0),
    "APG 8": APG(8.0),
    "CFG++ 0.6": CFGpp(0.6),
    "interval": Interval(CFG(8.0), 0.3, 5.0),
}
noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
pictures, cost = {}, {}
for name, method in METHODS.items():
    with attach(pipe, method) as handle:
        pictures[name] = pipe(PROMPTS, num_inference_steps=20, latents=noise, output_type="np").images
    cost[name] = handle.nfe / len(PROMPTS)

# %% [markdown]
# What did they cost, and do the pictures show what the prompts say? The oracle reads the shapes back out of the pixels.

# %%
oracle = load_reward("oracle")
for name, images in pictures.items():
    verdicts = oracle(torch.from_numpy(images).permute(0, 3, 1, 2), PROMPTS)
    print(f"{name:10} {cost[name]:4.0f} network evaluations, right: {verdicts.tolist()}")
(OUT / "methods.png").write_bytes(sheet((name, [Cell(list(images))]) for name, images in pictures.items()))

# %% [markdown]
# ## On a real model
#
# Two lines change, the pipeline and the prompts; for the oracle take `pickscore`, which judges photographs.
#
# ```python
# pipe = load_model("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16).to("cuda")   # SD 1.5
# pipe = load_model("stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.bfloat16).to("cuda")     # SDXL
# pipe = load_model("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")                 # FLUX
# PROMPTS = ["a photo of a cat left of a dog", "two green apples on a black table"]
# ```
#
# Leave `latents=noise` out, or give it the shape of the model's own latents.
