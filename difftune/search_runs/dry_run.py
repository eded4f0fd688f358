"""What `difftune search` would do."""

from difftune.configs.search import SearchConfig
from difftune.lookup import method_of
from difftune.pipelines import dry_run
from difftune.pipelines.opened import open_pipeline
from difftune.search_runs.run_folder import check_search


def search(config: SearchConfig) -> dry_run.Lines:
    """The plan of a search: its time is that of the network evaluations, by those of one picture."""
    check_search(config)
    count = len(config.prompt)
    work = f"{config.method}: at most {config.nfe_budget} network evaluations of each of {count} prompts"
    rewards = dry_run.named(config.reward)
    lines = {"model": dry_run.model_line(config.model), **dry_run.reward_lines(rewards), "work": work}
    if not dry_run.here(config.model):
        return {**lines, "time": dry_run.not_measured(config.model)}
    pipe = open_pipeline(config.model, config.lora)
    cost, nfe = dry_run.picture_cost(pipe, method_of(config), config.num_inference_steps)
    each = cost.seconds / nfe
    basis = f"{each:.2g} s an evaluation of one image, decoding included; reward calls come on top"
    return lines | dry_run.cost_lines(each * config.nfe_budget * count, cost.peak, basis)
