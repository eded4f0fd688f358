"""What `difftune optimize` would do."""

from dataclasses import replace

import torch

from difftune.configs.noise import RenoConfig
from difftune.pipelines import dry_run
from difftune.reno.run_folder import check_optimize, make_reno

ITERATIONS = 4  # that are run to measure


def optimize(config: RenoConfig) -> dry_run.Lines:
    """The plan of a noise optimisation, by a few iterations of one noise."""
    check_optimize(config)
    count = len(config.prompt) * config.seeds_per_prompt
    rewards = [*dry_run.named(config.reward), *([config.held_out] if config.held_out else [])]
    work = f"{count} noises, {config.iterations} iterations of {config.num_inference_steps} steps each"
    lines = {"model": dry_run.model_line(config.model), **dry_run.reward_lines(rewards), "work": work}
    if not (dry_run.here(config.model) and dry_run.rewards_here(rewards)):
        return {**lines, "time": dry_run.not_measured(config.model, rewards)}
    reno = replace(make_reno(config, None, None), progress=False)
    if torch.cuda.is_available():
        reno.pipe.to("cuda")
    cost = dry_run.measured(lambda: reno.optimize(config.prompt[:1], ITERATIONS, config.seed), reno.pipe)
    each = cost.seconds / ITERATIONS
    basis = f"{each:.2g} s an iteration of one noise; a batch of {config.batch_size} takes more memory"
    return lines | dry_run.cost_lines(each * config.iterations * count, cost.peak, basis)
