# %% [markdown]
# # Make one picture better
#
# The model stays as it is. Either the noise that the picture starts from is optimised (ReNO: a reward with a gradient,
# a model of few steps), or many pictures are drawn and steered (search: any reward).

# %%
from difftune import ReNO, load_model, search

PROMPT = ["two green triangles on a black background"]

# %% [markdown]
# ## Optimise the noise

# %%
reno = ReNO(load_model("tiny-turbo"), {"tiny-clip": 1.0}, held_out={"oracle": 1.0}, progress=False)
better = reno.optimize(PROMPT, iterations=30, seed=0)
better.save("out/one-picture/reno")
print(f"reward {float(better.rewards_before):.3f} -> {float(better.rewards):.3f}")
print("the held-out oracle on the way:", better.curve("held_out"))

# %% [markdown]
# ## Search
#
# Best-of-N is the baseline of every search. Compare at the same network evaluations *and* the same reward calls.

# %%
for method in ("best-of-n", "fk"):
    best = search(
        load_model("tiny"),
        PROMPT,
        method=method,
        reward={"tiny-clip": 1.0},
        nfe_budget=320,
        num_inference_steps=20,
        progress=False,
    ).run()
    best.save(f"out/one-picture/{method}")
    nfe, calls, reward = best.curve()[-1]
    print(f"{method}: reward {reward:.3f} for {nfe:.0f} network evaluations and {calls:.0f} reward calls")

# %% [markdown]
# ## On a real model
#
# The model and the rewards change:
#
# ```python
# import torch
#
# reward = {"hps-v2.1": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05}
# pipe = load_model("stabilityai/sd-turbo").to("cuda")                                           # SD
# pipe = load_model("stabilityai/sdxl-turbo").to("cuda")                                         # SDXL
# pipe = load_model("black-forest-labs/FLUX.1-schnell", dtype=torch.bfloat16).to("cuda")   # FLUX
# better = ReNO(pipe, reward).optimize(PROMPT)
#
# pipe = load_model("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
# best = search(pipe, PROMPT, method="fk", reward={"pickscore": 1.0}).run()
# ```
