"""All guidance methods, by name."""

from collections.abc import Callable

from guidance.adaptive import AdaptiveGuidance, LinearAG
from guidance.apg import APG
from guidance.cfg import CFG, Between, Plain, Scale, strength
from guidance.cfgpp import CFGpp
from guidance.classifier import GFCG, ClassifierGuidance
from guidance.compose import Interval, Rescale
from guidance.conditions import MultiCondition, NullTextInversion
from guidance.contract import Guidance
from guidance.dynamic import DynamicCFG
from guidance.frequency import FDG
from guidance.negative import NAG, NASA, PerpNeg
from guidance.project import TCFG, CFGZeroStar
from guidance.weak import PAG, SEG, SLG, AutoGuidance

GUIDANCE: dict[str, Callable[..., Guidance]] = {
    "none": Plain,
    "cfg": CFG,
    "cfgpp": CFGpp,
    "apg": APG,
    "ag": AdaptiveGuidance,
    "linear-ag": LinearAG,
    "gfcg": GFCG,
    "interval": Interval,
    "rescale": Rescale,
    "perpneg": PerpNeg,
    "autoguidance": AutoGuidance,
    "cfg-zero": CFGZeroStar,
    "tcfg": TCFG,
    "fdg": FDG,
    "pag": PAG,
    "slg": SLG,
    "seg": SEG,
    "dynamic": DynamicCFG,
    "classifier": ClassifierGuidance,
    "nasa": NASA,
    "nag": NAG,
    "multi": MultiCondition,
    "null-text": NullTextInversion,
}

__all__ = [
    "APG",
    "CFG",
    "FDG",
    "GFCG",
    "GUIDANCE",
    "NAG",
    "NASA",
    "PAG",
    "SEG",
    "SLG",
    "TCFG",
    "AdaptiveGuidance",
    "AutoGuidance",
    "Between",
    "CFGZeroStar",
    "CFGpp",
    "ClassifierGuidance",
    "DynamicCFG",
    "Interval",
    "LinearAG",
    "MultiCondition",
    "NullTextInversion",
    "PerpNeg",
    "Plain",
    "Rescale",
    "Scale",
    "strength",
]
