"""A run with every name in its settings as an object: resolved once, and handed to all that a recipe calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from difftune.configs.training import TrainingConfig
from difftune.files.checkpoint import Say, State
from difftune.files.prompts import Prompts
from difftune.lookup import method_of
from difftune.pipelines import lora
from difftune.pipelines.compiled import compiled
from difftune.pipelines.engine import kernels
from difftune.rollouts.image_sampler import ImageSampler
from difftune.training.state import Training, begin_training
from rewards.registry import Reward
from solvers.families.attention import Verdict

Settings = TypeVar("Settings", bound=TrainingConfig)
Held = TypeVar("Held", bound=TrainingConfig, covariant=True)


@dataclass(frozen=True)
class Session(Generic[Held]):
    """Everything that a recipe trains with."""

    config: Held
    run: Training  # weights, optimiser, and what a resumed run goes on from
    images: ImageSampler  # the model under the guidance method and the sampler
    prompts: Prompts  # the prompt of each sample's number
    judge: Reward | None  # the reward; None if labels, pictures or an objective of sets take its place
    attention: Verdict
    say: Say

    @property
    def reward(self) -> Reward:
        """The reward of a recipe that needs one."""
        assert self.judge is not None
        return self.judge

    @property
    def steps(self) -> range:
        """The remaining optimiser steps, counted from 0."""
        return range(self.run.done, self.config.max_train_steps)

    def tell(self, **lines: str) -> None:
        """Say what was resolved, a line each."""
        for name, line in lines.items():
            self.say(f"{name}: {line}")


@contextmanager
def open_session(
    config: Settings, state: State | None, pipe: Any, prompts: Prompts, reward: Reward | None, reference: bool, say: Say
) -> Iterator[Session[Settings]]:
    """The pipeline with an adapter to train, under the kernels that config asks for.

    reference: the recipe calls `Training.reference`. Raises UserError if the state is of other settings.
    """
    run = begin_training(config, state, pipe, reference)
    network = lora.network_of(pipe)
    with (
        kernels(config.enable_xformers_memory_efficient_attention, config.deterministic, network) as found,
        compiled(pipe, config.compile, guidance=method_of(config)) as blocks,
    ):
        images = ImageSampler.of(config, pipe, run.network)
        session = Session(config, run, images, prompts, reward, found, say)
        session.tell(attention=f"{found.backend} ({found.why})")
        if config.lora is not None:
            kept = "with it as it was" if config.reference == "start" else "without it"
            session.tell(lora=f"goes on from {config.lora}; the reference is the model {kept}")
        if blocks is not None:
            session.tell(compile=blocks)
        if config.deterministic:
            session.tell(deterministic="torch's deterministic algorithms")
        yield session
