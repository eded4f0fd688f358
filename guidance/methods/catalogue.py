"""All guidance methods, by name."""

from collections.abc import Callable

from guidance.contract import Guidance
from guidance.methods.adaptive import AdaptiveGuidance
from guidance.methods.ahead import CFGMP, RectifiedCFGpp
from guidance.methods.apg import APG, APGMix
from guidance.methods.cfg import CFG, Plain
from guidance.methods.cfgpp import CFGpp
from guidance.methods.classifier import GFCG, ClassifierGuidance
from guidance.methods.compose import Interval, Rescale
from guidance.methods.conditions import MultiCondition, NullTextInversion
from guidance.methods.dynamic import DynamicCFG
from guidance.methods.feedback import FBG
from guidance.methods.frequency import FDG
from guidance.methods.linear_ag import LinearAG
from guidance.methods.magnitude import MamboG
from guidance.methods.negative import NAG, NASA, PerpNeg
from guidance.methods.project import TCFG, CFGZeroStar
from guidance.methods.scales import Between, Scale, strength
from guidance.methods.weak import PAG, SEG, SLG, STG, AutoGuidance

GUIDANCE: dict[str, Callable[..., Guidance]] = {
    "none": Plain,
    "cfg": CFG,
    "cfgpp": CFGpp,
    "rectified-cfgpp": RectifiedCFGpp,
    "cfg-mp": CFGMP,
    "apg": APG,
    "apg-mix": APGMix,
    "mambo-g": MamboG,
    "fbg": FBG,
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
    "stg": STG,
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
    "CFGMP",
    "FBG",
    "FDG",
    "GFCG",
    "GUIDANCE",
    "NAG",
    "NASA",
    "PAG",
    "SEG",
    "SLG",
    "STG",
    "TCFG",
    "APGMix",
    "AdaptiveGuidance",
    "AutoGuidance",
    "Between",
    "CFGZeroStar",
    "CFGpp",
    "ClassifierGuidance",
    "DynamicCFG",
    "Interval",
    "LinearAG",
    "MamboG",
    "MultiCondition",
    "NullTextInversion",
    "PerpNeg",
    "Plain",
    "RectifiedCFGpp",
    "Rescale",
    "Scale",
    "strength",
]
