"""difftune: guide, search, optimise and fine-tune any diffusers model with any reward.

The public names below are imported when they are first used, so that `import difftune` is quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
__distribution__ = "difftune"

_HOME = {  # public name -> where it lives: "module", "module:its name there", or "module:" for the module itself
    "attach": "difftune.pipelines.attached",
    "as_guider": "guidance.guider",
    **dict.fromkeys(
        (
            "APG",
            "APGMix",
            "AdaptiveGuidance",
            "AutoGuidance",
            "Between",
            "CFG",
            "CFGMP",
            "CFGZeroStar",
            "CFGpp",
            "ClassifierGuidance",
            "DynamicCFG",
            "FBG",
            "FDG",
            "GFCG",
            "Interval",
            "LinearAG",
            "MamboG",
            "MultiCondition",
            "NAG",
            "NASA",
            "NullTextInversion",
            "PAG",
            "PerpNeg",
            "Plain",
            "RectifiedCFGpp",
            "Rescale",
            "SEG",
            "SLG",
            "STG",
            "TCFG",
        ),
        "guidance.methods.catalogue",
    ),
    **dict.fromkeys(("Branch", "Guided"), "guidance.contract"),
    "guided": "guidance.guided",
    "invert": "guidance.invert",
    "edit": "guidance.invert",
    "null_text_inversion": "guidance.invert",
    "frechet": "rewards.sets.frechet",
    "vendi": "rewards.sets.vendi",
    "GUIDANCE": "guidance.methods.catalogue",
    "REWARDS": "rewards.registry",
    "load_reward": "rewards.registry:load",
    "weighted": "rewards.compose",
    "parse_rewards": "rewards.compose",
    "Noise": "solvers.noise",
    "Path": "solvers.denoiser",
    "LatentModel": "solvers.latent",
    "SAMPLERS": "solvers.samplers.catalogue",
    "run_sampler": "solvers.samplers.catalogue:sample",
    "generate": "difftune.pipelines.generate",
    "compiled": "difftune.pipelines.compiled",
    "SampleConfig": "difftune.configs.images",
    "rollout": "solvers.rollout.modes",
    "MODELS": "difftune.models",
    "load_model": "difftune.models:load",
    "models": "difftune.models:",
    "lora": "difftune.pipelines.lora:",
    **dict.fromkeys(
        (
            "AdjointMatchingConfig",
            "AlignPropConfig",
            "D3POConfig",
            "DDPOConfig",
            "DPOConfig",
            "DROConfig",
            "DraftConfig",
            "DragonConfig",
            "DrtuneConfig",
            "GRPOConfig",
            "HypernoiseConfig",
            "KTOConfig",
            "NFTConfig",
            "PSOConfig",
            "ReflConfig",
        ),
        "difftune.configs.recipes",
    ),
    "RECIPES": "difftune.recipes",
    "train": "difftune.recipes",
    "train_in_folder": "difftune.recipes",
    "ReNO": "difftune.reno.optimizer",
    "search": "difftune.search_runs.search",
    "Expert": "difftune.search_runs.experts",
    "SEARCHES": "guidance.search.catalogue",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"difftune has no {name!r}; it has {', '.join(__all__)}")
    module, colon, attribute = _HOME[name].partition(":")
    found = import_module(module)
    return found if colon and not attribute else vars(found)[attribute or name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _check_overlay(package: str) -> None:
    """Two distributions that write into one folder overlay each other: `package` must be ours."""
    found = vars(import_module(package))
    if found.get("__distribution__") == __distribution__:
        return
    from importlib.metadata import packages_distributions

    others = sorted(set(packages_distributions().get(package, [])) - {__distribution__})
    by = f"the distribution {' or '.join(others)}" if others else f"{found.get('__file__') or list(found['__path__'])}"
    remedy = f"pip uninstall {' '.join(others)} && " if others else ""
    raise ImportError(
        f"the package {package!r} of difftune is overlaid by {by}: in a fresh environment, or after "
        f"`{remedy}pip install --force-reinstall --no-deps difftune`, import it again"
    )


for _package in ("guidance", "rewards", "solvers"):
    _check_overlay(_package)
