"""PSO: fine-tune a LoRA of a few-step model on pairs of images, at its own steps (https://arxiv.org/abs/2410.03190).

A distilled model knows the few noise levels tau_1 > ... > tau_N of its sampler and no other, so that a denoising loss
at random levels blurs what it makes. Each of its steps is a Gaussian, p(x' | x, c), whose mean the network gives; the
margin of the better image over the worse one is raised at those steps alone:

    l_k  = log p_theta(x'_k | x_k, c) / p_ref(x'_k | x_k, c),
    loss = mean over pairs and steps of  -log sigmoid(beta (l_winner - l_loser)).

Online, the winner and the loser are the best and the worst of the trajectories that the model samples of a prompt, l is
that of the transitions which it took, kept within log(1 -+ clip_range), and the last step, which adds no noise, is left
out. Offline, the winners are the pictures of a folder, of a style or a concept, and the losers what the model makes of
their captions before training; they are noised to a level tau, and l is, up to a constant, minus half the denoising
error there: Diffusion-DPO on the model's own levels. `train` is the algorithm, `run` what the command line does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from difftune.configs.recipes import PSOConfig
from difftune.errors import UserError
from difftune.files.checkpoint import Say, State
from difftune.files.pictures import captioned, stack
from difftune.files.prompts import listed, prompts_named
from difftune.lookup import at_least, known, reward_named, reward_weights
from difftune.models import load as load_model
from difftune.recipes.dpo import dpo_loss, dpo_margin
from difftune.rollouts.denoising import draw
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.pairs import Pairs, pair_errors
from difftune.rollouts.policy import Kernel, Policy, log_ratio
from difftune.rollouts.rounds import Rolled, check_groups, engine, repeated, roll, under
from difftune.training.state import (
    Metrics,
    Reward,
    Training,
    begin,
    differentiate,
    follow,
    samples,
    statistics,
    steps,
    update,
)
from difftune.training.state import card as model_card
from difftune.training.state import check as check_shared
from guidance.guided import GuidedPredict
from solvers.denoiser import Prediction
from solvers.noise import Noise
from solvers.samplers.step import transition

# ------------------------------------------------------------------------------------------------ the algorithm


def consistency(prediction: Prediction, now: Noise, then: Noise, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean alpha' x0 (B, ...) and deviation sigma' () of a step whose noise is all new: LCM's and DMD2's.

    Multistep consistency sampling (https://arxiv.org/abs/2303.01469, algorithm 1). eta below 1 keeps a part of the
    noise, as in DDIM: alpha' x0 + sqrt(1 - eta^2) sigma' eps, and deviation eta sigma'.
    """
    kept = (1 - eta**2) ** 0.5
    return then.alpha * prediction.x0 + kept * then.sigma * prediction.eps, eta * then.sigma


TRANSITIONS: dict[str, Kernel] = {"lcm": consistency, "ancestral": transition}


def pso_loss(
    winner: Tensor, loser: Tensor, label: Tensor, beta: float = 50.0, clip_range: float | None = 0.1
) -> Tensor:
    """The mean of -log sigmoid(beta label (l_w - l_l)), with l kept within log(1 -+ clip_range) unless that is None.

    winner, loser: log p_theta / p_ref (P,) of one step, means over the latent's elements. label (P,): 1, or 0 for a
    tie, which has no gradient. ln 2 where the model is the reference.
    """
    if clip_range is not None:
        winner, loser = (ratio.exp().clamp(1 - clip_range, 1 + clip_range).log() for ratio in (winner, loser))
    return -logsigmoid(beta * label * (winner - loser)).mean()


class Ordered(NamedTuple):
    """A batch of trajectories, and of each prompt's the best and the worst."""

    rolled: Rolled
    rows: Tensor  # (2 P,): the winners, then the losers
    label: Tensor  # (P,), see pso_loss


def ordered(rolled: Rolled, group: int) -> Ordered:
    """Of `group` samples in a row."""
    scores = rolled.scores.view(-1, group)
    starts = torch.arange(len(scores), device=scores.device) * group
    rows = torch.cat([starts + scores.argmax(1), starts + scores.argmin(1)])
    return Ordered(rolled, rows, (scores.amax(1) > scores.amin(1)).to(scores))


def train(
    config: PSOConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step, from the step of `state` on.

    pipe, reward: those that config names, unless given; the reward needs no gradient, and judges only if config names
    no pictures. The pipeline gets the adapter, and keeps it. `say` is told what was resolved.
    Raises UserError for settings that cannot be, RunError after too many steps that were not finite.
    """
    check(config, pipe, reward)
    run = begin(config, state, load_model(config.model) if pipe is None else pipe, reference=True)
    chain = Chain.of(config, run.pipe, run.network)
    name = transition_of(config, run.pipe)
    policy = Policy(TRANSITIONS[name], 1.0, chain.levels)
    with engine(config, run, say, transition=name):
        descend = offline if config.images is not None else online
        one = descend(config, run, chain, policy, reward)
        yield from steps(config, run, one)


def online(
    config: PSOConfig, run: Training, chain: Chain, policy: Policy, reward: Reward | None
) -> Callable[[int], Metrics]:
    """An optimiser step on trajectories that are sampled for it."""
    judge = reward_named(config.reward, gradient=False) if reward is None else reward
    group, passes = config.num_images_per_prompt, range(config.gradient_accumulation_steps)
    prompts = repeated(prompts_named(config.prompts, config.seed), group)

    def descend(step: int) -> Metrics:
        numbers = [samples(config, step, i, run.rank, run.world) for i in passes]
        batches = [ordered(roll(chain, policy, prompts, judge, n, run), group) for n in numbers]
        met = steps_down(config, run, policy, batches)
        return {**statistics(run.accelerator.gather(torch.cat([b.rolled.scores for b in batches]))), **met}

    return descend


def steps_down(config: PSOConfig, run: Training, policy: Policy, batches: Sequence[Ordered]) -> Metrics:
    """One optimiser step on every random step of every trajectory of a pair, and what it met."""
    turns = [(batch, i) for batch in batches for i in batch.rolled.trajectory.drawn]
    met = []
    for n, (batch, i) in enumerate(turns):
        path, after = (batch.rolled.trajectory.paths[k][batch.rows] for k in (i, i + 1))
        predict = rows_of(batch.rolled.predict, batch.rows)
        with torch.no_grad():
            before, _ = policy.mean(under(predict, run.reference), path, i)
        with run.learning(last=n == len(turns) - 1):
            mean, std = policy.mean(predict, path, i)
            winner, loser = log_ratio(after.x, mean, before, std).chunk(2)
            loss = pso_loss(winner, loser, batch.label, beta_of(config), config.clip_range)
            differentiate(run, loss / len(turns))
        margin = batch.label * (winner - loser).detach()
        met.append(torch.stack([loss.detach(), *agreement(margin)]))
    return gathered(config, run, met)


def offline(
    config: PSOConfig, run: Training, chain: Chain, policy: Policy, reward: Reward | None
) -> Callable[[int], Metrics]:
    """An optimiser step on pictures against what the model made of their captions before training."""
    pairs, passes = pictures_of(config, run, chain, policy), config.gradient_accumulation_steps
    chosen = listed(list(range(len(pairs.winner))), config.seed)
    timesteps = [round(float(chain.denoiser.clock(at))) for at in chain.levels[:-1]]

    def descend(step: int) -> Metrics:
        met = []
        for n in range(passes):
            numbers = samples(config, step, n, run.rank, run.world)
            batch = pairs.rows([chosen(i) for i in numbers])
            draws = draw(chain.model, [f"{config.seed} draw {i}" for i in numbers], timesteps)
            with torch.no_grad():
                before = pair_errors(chain, run.reference, batch, draws)
            with run.learning(last=n == passes - 1):
                margin = dpo_margin(*pair_errors(chain, run.network, batch, draws), *before, beta_of(config))
                loss = dpo_loss(margin)
                differentiate(run, loss / passes)
            met.append(torch.stack([loss.detach(), *agreement(margin.detach())]))
        return gathered(config, run, met)

    return descend


@torch.no_grad()
def pictures_of(config: PSOConfig, run: Training, chain: Chain, policy: Policy) -> Pairs:
    """Each picture of the folder with each of the images that the model made of its caption before training.

    Their noise depends on the seed alone: a resumed run makes them again.
    """
    found, model = captioned(config.images or "", config.caption), chain.model
    texts = [str(picture.caption) for picture in found for _ in range(config.num_negatives)]
    winner = [model.encode_images(stack([picture], model.size()).to(model.device)) for picture in found]
    losers = []
    for start in range(0, len(texts), config.train_batch_size):
        numbers = range(start, min(start + config.train_batch_size, len(texts)))
        _, x, noise, predict = chain.begin(texts.__getitem__, numbers, None)
        assert noise is not None  # check lets only a stochastic sampler pass
        losers.append(policy.sample(under(predict, run.reference), x, noise).end)
    both = torch.cat(winner).repeat_interleave(config.num_negatives, 0), torch.cat(losers)
    return Pairs(*both, model.encode(texts)["cond"], torch.ones(len(texts), device=model.device))


def rows_of(predict: GuidedPredict, rows: Tensor) -> GuidedPredict:
    """The same predictions for some samples of the batch."""
    conds = {name: {key: value[rows] for key, value in cond.items()} for name, cond in predict.conds.items()}
    return replace(predict, conds=conds)


def agreement(margin: Tensor) -> tuple[Tensor, Tensor]:
    """How often the model prefers the winner more than its reference does, ties counting one half; the mean margin."""
    return (margin.sign() + 1).mean() / 2, margin.mean()


def gathered(config: PSOConfig, run: Training, met: Sequence[Tensor]) -> Metrics:
    """Take the optimiser step; the means of what its backward passes met."""
    norm = update(config, run)
    loss, accuracy, margin = run.accelerator.gather(torch.stack(list(met))).view(-1, 3).mean(0).tolist()
    return {"loss": loss, "grad_norm": norm, "accuracy": accuracy, "margin": margin}


# ------------------------------------------------------------------------------------------------ the command


def run(config: PSOConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train pso`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward)


def check(config: PSOConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    at_least(0, beta=beta_of(config), clip_range=config.clip_range)
    if config.transition is not None:
        known("transition", config.transition, TRANSITIONS)
    if config.sampler != "ancestral":
        raise UserError(f"sampler {config.sampler!r} is not pso's: leave it at 'ancestral', and set transition")
    if config.images is not None:
        at_least(1, num_negatives=config.num_negatives)
        captioned(config.images, config.caption)
    else:
        check_online(config, reward)


def check_online(config: PSOConfig, reward: Reward | None) -> None:
    check_groups(config, least=2)
    at_least(2, num_inference_steps=config.num_inference_steps)  # the last adds no noise, and is not trained
    if config.lora_dropout:
        raise UserError(
            f"lora_dropout is {config.lora_dropout}: the ratio of two probabilities would be noise, so leave it at 0"
        )
    if reward is None:
        reward_weights(config.reward)


def beta_of(config: PSOConfig) -> float:
    """The setting, or what is usual: 50 for log-probabilities of transitions, 5000 for denoising errors."""
    if config.beta is not None:
        return config.beta
    return 50.0 if config.images is None else 5000.0


def transition_of(config: PSOConfig, pipe: Any) -> str:
    """The setting, or what the pipeline's scheduler does."""
    own = "lcm" if "LCM" in type(pipe.scheduler).__name__ else "ancestral"
    return own if config.transition is None else config.transition


def card(config: PSOConfig, metrics: Metrics) -> str:
    of = config.reward if config.images is None else [f"the pictures of {config.images}"]
    about = replace(config, reward=of)
    return model_card(about, metrics, "pso", "PSO ([2410.03190](https://arxiv.org/abs/2410.03190))")
