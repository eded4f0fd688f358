# %% [markdown]
# # Fine-tune on a reward
#
# AlignProp sends the gradient of a reward through the sampler into a LoRA. The oracle is held out: it is never trained
# on, so it tells whether the pictures became better or only fooled the reward.

# %%
from pathlib import Path

from difftune import AlignPropConfig, attach, load_model, train_in_folder
from guidance import Plain

OUT = Path("out/fine-tune")
config = AlignPropConfig(
    model="tiny",
    reward=["tiny-clip"],
    prompts="shapes",
    output_dir=str(OUT),
    num_inference_steps=10,
    guidance="none",  # what guidance does is there to be learnt
    max_train_steps=24,
    validation_steps=12,
    validation_reward="oracle",
    num_validation_images=12,
)
found = train_in_folder(config)

# %%
print(f"validation, trained reward: {found['validation_first']:.3f} -> {found['validation_last']:.3f}")
print(f"validation, held-out oracle: {found['held_out_first']:.3f} -> {found['held_out_last']:.3f}")
print("curves, pictures before and after, settings:", OUT / "report.html")

# %% [markdown]
# 24 steps are a beginning; `difftune train alignprop --config tiny-alignprop` takes 200. The LoRA is diffusers' own
# format:

# %%
pipe = load_model("tiny")
pipe.load_lora_weights(OUT)
with attach(pipe, Plain()):
    pipe("two green triangles", num_inference_steps=10).images[0].save(OUT / "after.png")

# %% [markdown]
# ## On a real model
#
# The model and the reward change, and the prompts come from a file of yours:
#
# ```python
# model="stable-diffusion-v1-5/stable-diffusion-v1-5", reward=["aesthetic"], prompts="prompts.txt",      # SD 1.5, 24 GB
# model="stabilityai/stable-diffusion-xl-base-1.0", reward=["pickscore"], prompts="prompts.txt",         # SDXL, 24 GB
# model="black-forest-labs/FLUX.1-dev", reward=["pickscore"], prompts="prompts.txt",                     # FLUX, 80 GB
# ```
#
# ... --dry_run` first how long it takes.
