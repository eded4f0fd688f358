"""The settings of `difftune sample`, `eval` and `compare`, whose flags stand in difftune/cli/images.py."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from solvers.ranges import Count, Many, NotNegative, Ranged, Seed, Steps


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Ranged):
    """What each of the three is told.

    lora: folders of training runs, each as FOLDER or FOLDER=SHARE. batch_size: images at a time; it changes no image.
    """

    model: str
    output_dir: str | None = None
    lora: str | Sequence[str] | None = None
    num_inference_steps: Steps = 25
    seed: Seed = 0
    batch_size: Count = 16

    def written(self) -> dict[str, Any]:
        """The settings as the result writes them down."""
        settings = asdict(self) | {"lora": self.lora or None}
        return {name: value for name, value in settings.items() if name != "output_dir"}


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ImagesConfig):
    """Images of prompts: image i of a prompt is drawn with seed + i.

    eta: the noise of DDIM's steps; 1 is DDPM. noise: a file of `difftune optimize`, with a noise for each image.
    noise_lora: the folder of `difftune train hypernoise`, whose LoRA moves each image's noise.
    lora_anneal: how the share of the LoRA's output grows from 0 to 1 along the steps: linear, power (its square), or
    switch (at 60 %); None is 1 throughout. num_frames: of each film, of a model of films (Wan); it is written as .mp4.
    compile: the network's blocks and the decoder's.
    image: a file with the picture that a pipeline starts from or edits (FLUX Kontext, Qwen-Image-Edit, img2img).
    """

    prompt: Sequence[str]
    output_dir: str
    guidance: str = "cfg"
    guidance_options: Mapping[str, Any] = field(default_factory=dict)
    num_images: Many = 1
    eta: NotNegative = 0.0
    noise: str | None = None
    noise_lora: str | None = None
    lora_anneal: Literal["linear", "power", "switch"] | None = None
    num_frames: Many | None = None
    compile: bool = False
    image: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ImagesConfig):
    """Scores of a model's images, or of images that are there, on a list of prompts.

    model: None if `images`, a folder of pictures with captions, takes its place. prompts: a name of
    `difftune.evaluation.prompt_lists`, a file, or "dataset:ID[:COLUMN]". prompts_per_category: the first ones that are
    used; None is all. reward: each is reported by itself; empty is the oracle. baseline: an earlier evaluation, with
    which this one is compared prompt by prompt. resume_from_checkpoint: "latest" goes on in output_dir; pictures and
    scores that are there are kept.
    """

    model: str | None = None  # type: ignore[assignment]
    guidance: str = "cfg"
    guidance_options: Mapping[str, Any] = field(default_factory=dict)
    prompts: str = "shapeeval"
    images: str | None = None
    reward: Sequence[str] = ()
    images_per_prompt: Many = 4
    prompts_per_category: Count | None = None
    baseline: str | None = None
    resume_from_checkpoint: Literal["latest"] | None = None


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ImagesConfig):
    """Guidance methods side by side, each at each of CFG's `scales`.

    reward: scores beside saturation and contrast; empty is the oracle, if it can judge all prompts.
    """

    prompt: Sequence[str]
    output_dir: str
    guidance: Sequence[str] = ("cfg",)
    scales: Sequence[float] = (7.5,)
    reward: Sequence[str] = ()
    num_images: Many = 4
