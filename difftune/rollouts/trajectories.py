"""Trajectories that the model samples, scored; each of their steps is weighed again by other weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difftune.errors import UserError
from difftune.files.prompts import Prompts
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.policy import ETAS, FLOWS_ALONE, KERNELS, Policy, Trajectory, check_eta, kernel_of
from difftune.rollouts.session import Session
from difftune.training.network import TrainedNetwork
from difftune.training.steps import score_images
from guidance.guided import GuidedPredict


@dataclass(frozen=True)
class Rolled:
    """A batch of trajectories, and their scores."""

    texts: Sequence[str]
    predict: GuidedPredict  # of the weights as they are when it is called
    trajectory: Trajectory
    scores: Tensor  # (B,)

    def mean(self, policy: Policy, i: int) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and deviation () of step i, with a gradient in the weights."""
        return policy.mean(self.predict, self.trajectory.paths[i], i)

    @torch.no_grad()
    def mean_under(self, network: TrainedNetwork, policy: Policy, i: int) -> Tensor:
        """The mean (B, ...) of step i by another network under the same guidance, without a gradient."""
        return policy.mean(self.predict_by(network), self.trajectory.paths[i], i)[0]

    def predict_by(self, network: TrainedNetwork) -> GuidedPredict:
        """The guided prediction of another network."""
        return with_network(self.predict, network)

    def after(self, i: int) -> Tensor:
        """The latents (B, ...) at the end of step i."""
        return self.trajectory.paths[i + 1].x

    def rows(self, index: Tensor) -> "Rolled":
        """Some samples of the batch, in this order."""
        cut = self.trajectory
        conds = {name: {key: value[index] for key, value in cond.items()} for name, cond in self.predict.conds.items()}
        means = [mean[index] for mean in cut.means]
        return Rolled(
            [self.texts[i] for i in index.tolist()],
            replace(self.predict, conds=conds),
            Trajectory([path[index] for path in cut.paths], means, cut.stds),
            self.scores[index],
        )


def with_network(predict: GuidedPredict, network: TrainedNetwork) -> GuidedPredict:
    """The same guidance of the same conditions by another network."""
    main: Any = predict.networks["main"]
    return replace(predict, networks={**predict.networks, "main": replace(main, network=network)})


@torch.no_grad()
def roll_out(session: Session, policy: Policy, prompts: Prompts, numbers: range, shared: int = 1) -> Rolled:
    """Sample and score trajectories; a sample's noise depends on the seed and its number alone.

    shared: so many in a row start from the first one's x_T. Raises NotFinite if a score is not finite.
    """
    images = session.images
    start = images.begin(prompts, numbers)
    assert start.noise is not None  # check_policy lets only a stochastic sampler pass
    trajectory = policy.sample(start.predict, start.x[::shared].repeat_interleave(shared, 0), start.noise)
    scores = score_images(session.reward, images.model.decode(trajectory.end), start.prompts, session.run)
    return Rolled(start.prompts, start.predict, trajectory, scores)


def policy_of(images: ImageSampler, eta: float | None, kernel: str | None = None) -> Policy:
    """The images' sampler as a policy with a kernel of `KERNELS`, and its paper's noise if eta is None.

    kernel None: DDIM with eta, or the SDE of a flow. UserError for the SDE of a flow if the network predicts none.
    """
    space = images.denoiser.prediction_type
    name = kernel or kernel_of(space)
    if name in FLOWS_ALONE and space != "flow":
        raise UserError(
            f"kernel {name!r} is the SDE of a flow, and this network predicts {space}: give 'ddim' or 'cps'"
        )
    check_eta(name, eta)
    return Policy(KERNELS[name], ETAS[name] if eta is None else eta, images.levels)
