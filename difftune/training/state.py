"""The state of a run: what it trains and all that its next step depends on, saved and resumed bit for bit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from difftune import processes
from difftune.configs.recipes import RewardGradientConfig
from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.files import checkpoint
from difftune.files.checkpoint import Randomness, State
from difftune.files.codec import decode, encode
from difftune.pipelines import fingerprint, full_weights, lora
from difftune.training import run_folder
from difftune.training.gradient_log import GradientLog, Pair
from difftune.training.network import DTYPES, FrozenNetwork, ReferenceNetwork, TrainedNetwork
from difftune.training.numbering import sample_numbers, seed_of
from difftune.training.optimizers import OPTIMIZERS, learning_rates
from difftune.training.reward_statistics import PerPrompt
from rewards.compose import Scales
from solvers.rollout.run import unchecked_gradients, watch_gradients, watching

Metrics = dict[str, float]


class Kept(NamedTuple):
    """A recipe's own state, which a resumed run finds in `Training.own`."""

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]


def keep_nothing() -> Kept:
    return Kept({}, {})


@dataclass
class Training:
    """The trained weights of a run, their optimiser and the rest of its state; made by `begin_training`."""

    config: TrainingConfig
    pipe: Any
    accelerator: Accelerator
    network: TrainedNetwork
    weights: Mapping[str, Tensor]  # trained, by name
    optimizer: Any
    rate: Callable[[int], float]  # the learning rate's factor
    average: "Average | None" = None  # of the weights
    base: nn.Module | None = None  # the network before full fine-tuning, if a recipe asked for it
    gradients: GradientLog | None = None  # of a LoRA that follows a reward's gradient
    start: Mapping[str, Tensor] | None = None  # the adapter that training went on from, if it is the reference
    start_digest: str | None = None  # of its file
    done: int = 0  # optimiser steps before this process began
    skipped: int = 0  # of them and since, how many were not finite
    seen: PerPrompt = field(default_factory=PerPrompt)  # the rewards of each prompt, in all processes
    scales: Scales = field(default_factory=Scales)  # of several rewards, in all processes
    own: Kept = field(default_factory=keep_nothing)  # what a recipe gave `take_snapshot`, of the resumed state
    generators: Randomness | None = None  # with which the first remaining step begins

    @property
    def reference(self) -> ReferenceNetwork:
        """The network as it was before training, to be called as `network` is.

        Raises UserError under full fine-tuning unless `begin_training` was asked for it.
        """
        if self.base is None and not lora.adapted(self.network.prepared):
            raise UserError("this recipe keeps no copy of the network for --full_finetuning: train a LoRA with it")
        return ReferenceNetwork(self.base or self.network.prepared, self.network.dtype, self.start)

    @property
    def frozen(self) -> FrozenNetwork:
        """`reference`, but that a gradient reaches its input."""
        return FrozenNetwork(self.reference.prepared, self.network.dtype, self.start)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    def numbers(self, step: int) -> list[range]:
        """This process's samples in each backward pass of an optimiser step."""
        return sample_numbers(self.config, step, self.rank, self.world)

    @contextmanager
    def learning(self, last: bool = True) -> Iterator[None]:
        """Around a forward and its backward pass: dropout is on, and the processes' gradients meet in the `last`.

        A latent's gradient that is not finite is told with the sampler's step. It passes on in several processes, which
        must agree on what to do, and under a loss scaler, which finds its scale by overflowing.
        """
        network = self.network.prepared
        network.train()
        named = self.world == 1 and self.accelerator.scaler is None and watching() is None
        try:
            with (
                watch_gradients(lambda index, norm: None) if named else unchecked_gradients(),
                nullcontext() if last else self.accelerator.no_sync(network),
            ):
                yield
        finally:
            network.eval()


@dataclass
class Average:
    """The exponential moving average of the weights, as diffusers' EMAModel takes it.

    e <- d e + (1 - d) w after each update, with d = min(decay, (1 + n) / (10 + n)) for n updates before, and the first
    is a copy.
    """

    decay: float
    tensors: dict[str, Tensor]
    updates: int = 0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        for name, weight in weights.items():
            self.tensors[name].lerp_(weight.detach(), 1 - decay)
        self.updates += 1


# ------------------------------------------------------------------------------------------------ begin


def begin_training(config: TrainingConfig, state: State | None, pipe: Any, reference: bool = False) -> Training:
    """The pipeline on its device with an adapter to train, as it is at step 0 or as `state` has it.

    The pipeline keeps the adapter. reference: `Training.reference` is to be called, for which full fine-tuning keeps a
    copy of the network. Raises UserError if the state is of other settings, which it names.
    """
    if state is not None:
        run_folder.same_run(config, state)
        fingerprint.check_resumed(pipe, state.info.get("model_digest"))
        check_start_resumed(config, state)
    accelerator = make_accelerator(config.mixed_precision)
    pipe.to(accelerator.device)
    if config.mixed_precision != "no":
        pipe.to(dtype=DTYPES[config.mixed_precision])
    network = lora.network_of(pipe)
    weights, dtype = add_weights(config, pipe)
    start = copy_tensors(weights) if config.reference == "start" else None
    base = copy_network(accelerator, network) if reference and config.full_finetuning else None
    if state is not None:
        lora.load(network, state_tensors(state).weights)
    optimizer = OPTIMIZERS[config.optimizer](config, weights.values())
    prepared, optimizer = accelerator.prepare(network.eval(), optimizer)  # a new adapter's dropout is on
    weights = lora.weights(accelerator.unwrap_model(prepared))  # FSDP puts others in their place
    average = None if config.ema_decay is None else Average(config.ema_decay, copy_tensors(weights))
    called, rate = TrainedNetwork(prepared, dtype), learning_rates(config)
    run = Training(config, pipe, accelerator, called, weights, optimizer, rate, average, base, start=start)
    run.start_digest = None if start is None else checkpoint.digest(Path(config.lora or "", lora.WEIGHTS))
    if isinstance(config, RewardGradientConfig) and not config.full_finetuning:  # where a copy more would be large
        run.gradients = GradientLog(config.train_batch_size * config.gradient_accumulation_steps * run.world)
    if state is None:
        run.generators = first_generators(config.seed, run.rank)
    else:
        resume_training(run, state)
    return run


def check_start_resumed(config: TrainingConfig, state: State) -> None:
    """UserError if the reference's adapter is no longer what the state was made with."""
    if config.reference == "start" and checkpoint.digest(Path(config.lora or "", lora.WEIGHTS)) != state.info["start"]:
        raise UserError(f"the LoRA of {config.lora} has changed since the run began: it is the reference, put it back")


def first_generators(seed: int, rank: int) -> Randomness:
    """The global generators of a process before its first step: dropout and DRaFT-LV draw from them."""
    with checkpoint.seeded_generators(seed_of(seed, rank, "generators")):
        return checkpoint.randomness()


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Accelerate's engine. The precision is this run's, whatever an earlier run of this process had."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=processes.on_cpu(), mixed_precision=mixed_precision)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("DeepSpeed keeps the optimiser to itself, so that no step could be resumed: use DDP or FSDP2")
    return accelerator


def add_weights(config: TrainingConfig, pipe: Any) -> tuple[dict[str, Tensor], torch.dtype]:
    """The weights to train, by name, and the type that the network is called with."""
    if config.full_finetuning:
        return full_weights.add(pipe), torch.float32
    dtype = lora.network_of(pipe).dtype
    layout = config.lora_layers
    weights = lora.add(pipe, config.rank, config.lora_alpha, config.lora_dropout, config.seed, layout)
    if config.lora is not None:
        lora.start_from(lora.network_of(pipe), config.lora)
    return weights, dtype


def copy_network(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """A copy that is not trained and computes as the trained one does: of float32 weights, under the same autocast.

    At the first step the two agree bit for bit. In the copy's own bfloat16 they would differ by rounding, and their
    ratio would be noise.
    """
    return accelerator.prepare_model(deepcopy(network).requires_grad_(False).eval(), evaluation_mode=True)


def copy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------ state


class StateTensors(NamedTuple):
    """The tensors of a `State`; their names in a checkpoint are those of the fields, as in "optimizer.exp_avg.NAME"."""

    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] = {}
    optimizer: Mapping[str, Mapping[str, Any]] = {}  # of each moment: of each weight
    own: Mapping[str, Tensor] = {}
    gradient: Mapping[str, Tensor] = {}  # of the update before, which the next one's is compared with
    rng: Mapping[str, Mapping[str, Tensor]] = {}  # of each process


def state_tensors(state: State) -> StateTensors:
    """The tensors of a state by their owner."""
    return decode(StateTensors, state.tensors)


def take_snapshot(run: Training, step: int, metrics: Metrics, own: Kept | None = None) -> State:
    """Everything that the next step depends on, copied. own: what the recipe must find as `run.own` when resumed."""
    own = own or keep_nothing()
    everyone = gather_object([checkpoint.randomness()])
    tensors, rest = encode(
        StateTensors(
            {name: gather_whole(weight) for name, weight in run.weights.items()},
            {name: gather_whole(t) for name, t in run.average.tensors.items()} if run.average is not None else {},
            moments_of(run),
            {name: gather_whole(tensor) for name, tensor in own.tensors.items()},
            {} if run.gradients is None or run.gradients.previous is None else {"previous": run.gradients.previous},
            {str(rank): its.tensors for rank, its in enumerate(everyone)},
        )
    )
    numbers = rest.get("optimizer", {})
    info = {
        "cursor": sample_numbers(run.config, step, 0, run.world)[0].start,
        "num_processes": run.world,
        "model_digest": fingerprint.digest_of(run.pipe),
        "config": {**asdict(run.config), "resume_from_checkpoint": None},  # the same bits, resumed or not
        "metrics": metrics,
        "skipped": run.skipped,
        "updates": run.average.updates if run.average is not None else 0,
        "seen": run.seen.state(),
        "scales": run.scales.state(),
        "gradients": None if run.gradients is None else {"count": run.gradients.count, "pairs": run.gradients.pairs},
        "optimizer": {f"{key}.{name}": number for key, its in numbers.items() for name, number in its.items()},
        "own": dict(own.info),
        "rng": [its.info for its in everyone],
        "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
    }
    if run.start_digest is not None:
        info["start"] = run.start_digest
    return State(step, copy_tensors(tensors), info)


def moments_of(run: Training) -> dict[str, dict[str, Any]]:
    """The optimiser's state: of each moment, of each weight."""
    found: dict[str, dict[str, Any]] = {}
    for name, weight in run.weights.items():
        for key, value in run.optimizer.state[weight].items():
            found.setdefault(key, {})[name] = gather_whole(value) if isinstance(value, Tensor) else value
    return found


@checkpoint.going_on()
def resume_training(run: Training, state: State) -> None:
    """Put back what `take_snapshot` took, except the weights, and the generators, which the next step begins with."""
    tensors, info = state_tensors(state), state.info
    for name, weight in run.weights.items():
        its = {key: values[name] for key, values in tensors.optimizer.items() if name in values}
        its |= {key.partition(".")[0]: n for key, n in info["optimizer"].items() if key.partition(".")[2] == name}
        run.optimizer.state[weight] = {key: place_like(weight, key, value) for key, value in its.items()}
    if run.average is not None:
        run.average.updates = info["updates"]
        for name, tensor in tensors.ema.items():
            run.average.tensors[name] = place_like(run.weights[name], "ema", tensor)
    if run.accelerator.scaler is not None and info["scaler"]:
        run.accelerator.scaler.load_state_dict(info["scaler"])
    run.done, run.skipped = state.step, info["skipped"]
    run.own = Kept(tensors.own, info["own"])
    run.seen.load(info["seen"])
    run.scales.load(info.get("scales", {}))
    if run.gradients is not None and tensors.gradient:  # a checkpoint of 0.1 has none
        run.gradients.previous = tensors.gradient["previous"].to(run.accelerator.device)
        run.gradients.count = info["gradients"]["count"]
        run.gradients.pairs = [Pair(*pair) for pair in info["gradients"]["pairs"]]
    run.generators = Randomness(dict(tensors.rng[str(run.rank)]), info["rng"][run.rank])


def gather_whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from all processes if FSDP has divided it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(weight: Tensor, key: str, value: Any) -> Any:
    """An entry of the optimiser's state where the optimiser looks for it: torch's counter stays on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(weight, DTensor) and value.shape == weight.shape:
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value.clone().to("cpu" if key == "step" else weight.device)
