"""The settings of noise optimisation that hold for any pipeline and reward."""

from dataclasses import dataclass
from typing import Any, Literal

from difftune.lookup import known, sampler_named
from difftune.pipelines.engine import check_engine, check_offloading, gradient_named
from difftune.reno.named import needs_gradient, optimizer_named
from difftune.reno.paper import PAPER
from difftune.reno.regularizers import REGULARIZERS
from guidance.contract import Guidance
from solvers.ranges import Count, NotNegative, Positive, Ranged, Side, Steps

Variables = Literal["noise", "prompt", "both"]


@dataclass(frozen=True, kw_only=True)
class NoiseSettings(Ranged):
    """The settings of noise optimisation that a pipeline and a reward do not decide.

    guidance: a method; None, as few-step models want, is no guidance. optimizer: "sgd", "adam" or "lbfgs", or for
    rewards without a gradient "neighbours", "spsa" or "cma"; options as in "adam[learning_rate=0.1]", or an object of
    these classes. learning_rate and grad_clip are short for its options. setting: a name of `paper.PAPER`; None is that
    of the pipeline's model, if it is one of the paper's. What is None here is then the paper's: learning_rate, height,
    width, timesteps.
    gradient: a mode of `solvers.rollout.modes`; None is "checkpoint", or what `memory_budget` ("6GiB", weights
    included) has room for: one step is measured, and mode, block checkpointing and the samples at a time are chosen to
    fit.
    offload: the latents that wait for the backward pass do so in the host's memory, which on a CPU changes nothing.
    decode_batch, enable_vae_tiling: images that are decoded and rewarded at a time, and whether a large one is decoded
    in tiles.

    Raises UserError for an unknown name or an invalid setting.
    """

    num_inference_steps: Steps = 1
    sampler: str = "euler"
    guidance: Guidance | None = None
    embedded_guidance: float | None = None  # told to a network distilled over guidance scales (LCM)
    timesteps: tuple[int, ...] | None = None  # of the steps, in place of the scheduler's own
    height: Side | None = None  # of the images, in pixels
    width: Side | None = None
    setting: str | None = None
    variables: Variables = "noise"
    optimizer: Any = "sgd"
    learning_rate: NotNegative | None = None
    grad_clip: Positive | None = None
    regularizer: str = "chi"  # a name of `regularizers.REGULARIZERS`
    regularization_weight: NotNegative = 0.01
    reward_scaling: Literal["none", "range"] = "none"  # range: each reward as a share of its nominal range
    patience: Count | None = None  # iterations without a better image after which a sample leaves
    target: float | None = None  # total reward at which a sample leaves
    max_distance: NotNegative | None = None  # from the start, as a share of the start's norm
    gradient: str | None = None
    memory_budget: str | None = None
    offload: bool = False
    decode_batch: Count = 1
    enable_vae_tiling: bool = False

    def __post_init__(self):
        super().__post_init__()
        sampler_named(self.sampler)
        known("regularizer", self.regularizer, REGULARIZERS)
        if self.setting is not None:
            known("setting of ReNO's paper", self.setting, PAPER)
        check_engine(self.memory_budget, xformers=False)
        if needs_gradient(self.update) and self.gradient is not None:
            of = "weights" if self.variables == "prompt" else "noise"
            gradient_named(self.gradient, self.num_inference_steps, self.sampler, of)
            check_offloading(self.offload, self.gradient)

    @property
    def update(self) -> Any:
        """The optimiser as an object."""
        return optimizer_named(self.optimizer, self.learning_rate, self.grad_clip)

    @property
    def candidates(self) -> int:
        """The images of each sample that one iteration makes."""
        return vars(self.update).get("candidates", 1)

    @property
    def copies(self) -> int:
        """The tensors like z that the optimiser keeps, or asks for at a time."""
        options = vars(self.update)
        return 2 * options.get("history", 0) + options.get("candidates", 0)
