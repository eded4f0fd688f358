"""The recipes, each with its Config, its paper, and what judges the images. Nothing heavy is imported here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from difftune.configs.recipes import (
    AdjointMatchingConfig,
    AlignPropConfig,
    D3POConfig,
    DDPOConfig,
    DPOConfig,
    DraftConfig,
    DragonConfig,
    DROConfig,
    DrtuneConfig,
    GRPOConfig,
    HypernoiseConfig,
    KTOConfig,
    NFTConfig,
    PSOConfig,
    ReflConfig,
)
from difftune.configs.training import TrainingConfig

if TYPE_CHECKING:
    from difftune.files.checkpoint import State

    Steps = Iterator[tuple[dict[str, float], State]]


class Facts(NamedTuple):
    """What a recipe costs, and whose images it learns from, as `difftune methods` says it."""

    policy: str = "on-policy"  # off-policy: of other weights than those that are trained
    forwards: str = ""
    """Network calls for an image and an update, without guidance and a divergence, a backward pass counted as two: T
    sampler steps, of which K, W or n are trained."""
    families: str = "sd"  # of pipelines that the tests train


EVERY = "sd sdxl sd3 flux flux2 chroma pixart sana sana-sprint wan qwen zimage lumina2"  # families
ROUND, LABELS = "on-policy, off-policy after a round's first update", "on-policy, off-policy from labels"
FACTS = {
    "alignprop": Facts(forwards="T + 3K", families=EVERY),
    "draft": Facts(forwards="T + 3K"),
    "drtune": Facts(forwards="T + 3K"),
    "refl": Facts(forwards="T - K + 3"),
    "adjoint-matching": Facts(forwards="4T + 4n", families="sd sd3"),
    "hypernoise": Facts(forwards="4 + 3T", families="sd sd3"),
    "ddpo": Facts(ROUND, "4T", "sd sdxl sd3"),
    "grpo": Facts(ROUND, "T + 3W", EVERY),
    "nft": Facts("off-policy, by an average of the weights", "T + 4n", "sd sd3"),
    "d3po": Facts(LABELS, "5T", "sd sdxl sd3"),
    "dpo": Facts(LABELS, "T + 4", EVERY),
    "kto": Facts(LABELS, "T + 4"),
    "dro": Facts(LABELS, "T + 3"),
    "pso": Facts("on-policy, off-policy from pictures", "5T"),
    "dragon": Facts(ROUND, "T + 4"),
}

Needs = Literal["gradient", "any", "labels", "pictures", "set"]


@dataclass(frozen=True)
class Recipe:
    """One training algorithm, in the file difftune/recipes/NAME.py, with an underscore for a hyphen."""

    name: str
    config: type[TrainingConfig]
    title: str  # its name in its paper
    paper: str  # the paper's number on arXiv
    reward: Needs = "any"
    """What judges the images: a reward with a gradient; any reward; any reward, or a person's labels; any reward, or a
    folder of pictures; any reward, or an objective of sets of images."""
    reference: bool | str = False
    """Whether the model before training is called too: always, never, or if the setting of this name is above 0."""
    own_groups: bool = False
    """Whether it scales the parts of a reward in the group of a prompt by itself, over all batches of a round."""
    finish: str = ""
    """The function of the recipe's file that a run in a folder ends with, if it has one: see `write_win_rate`."""

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.paper}"

    @property
    def facts(self) -> Facts:
        return FACTS.get(self.name, Facts())

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def train(self) -> Callable[[Any], "Steps"]:
        """The algorithm: session -> metrics and state after each optimiser step."""
        return self.function(f"train_{self.module}")

    @property
    def check(self) -> Callable[[Any], None]:
        """UserError for the first of its own settings that is invalid."""
        return self.function(f"check_{self.module}")

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the recipe's file."""
        return vars(import_module(f"difftune.recipes.{self.module}"))[name]

    def wants_reference(self, config: TrainingConfig) -> bool:
        return vars(config)[self.reference] > 0 if isinstance(self.reference, str) else self.reference


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("alignprop", AlignPropConfig, "AlignProp", "2310.03739", "gradient", reference="kl_coeff"),
        Recipe("draft", DraftConfig, "DRaFT", "2309.17400", "gradient", reference="kl_coeff"),
        Recipe("drtune", DrtuneConfig, "DRTune", "2405.00760", "gradient", reference="kl_coeff"),
        Recipe("refl", ReflConfig, "ReFL", "2304.05977", "gradient", reference="kl_coeff"),
        Recipe("adjoint-matching", AdjointMatchingConfig, "Adjoint matching", "2409.08861", "gradient", reference=True),
        Recipe("hypernoise", HypernoiseConfig, "HyperNoise", "2508.09968", "gradient", reference=True),
        Recipe("ddpo", DDPOConfig, "DDPO", "2305.13301", reference="kl_weight"),
        Recipe("grpo", GRPOConfig, "Flow-GRPO", "2505.05470", reference="kl_weight", own_groups=True),
        Recipe("nft", NFTConfig, "DiffusionNFT", "2509.16117", reference=True, own_groups=True),
        Recipe("d3po", D3POConfig, "D3PO", "2311.13231", "labels", reference=True),
        Recipe("dpo", DPOConfig, "Diffusion-DPO", "2311.12908", "labels", reference=True),
        Recipe("kto", KTOConfig, "Diffusion-KTO", "2404.04465", "labels", reference=True),
        Recipe("dro", DROConfig, "DRO", "2503.22677", "labels"),
        Recipe("pso", PSOConfig, "PSO", "2410.03190", "pictures", reference=True),
        Recipe("dragon", DragonConfig, "DRAGON", "2504.15217", "set", reference=True, finish="write_win_rate"),
    )
}


def recipe_of(config: TrainingConfig) -> Recipe:
    """The recipe whose Config this is. TypeError for any other object."""
    for recipe in RECIPES.values():
        if type(config) is recipe.config:
            return recipe
    known = ", ".join(recipe.config.__name__ for recipe in RECIPES.values())
    raise TypeError(f"a {type(config).__name__} configures no recipe; these do: {known}")
