"""How a judge behind a server is asked, and how its answer is read."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rewards.errors import RewardError
from rewards.network import client
from rewards.registry import Entry, unknown

NUMBER = r"([-+]?\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Template:
    """How a judge is asked, and how its answer is read."""

    question: str  # with {prompt}, and with {picture} unless the picture comes first
    patterns: tuple[str, ...] = ()  # each finds a number of the answer, or N/A; their mean is the score; none: P(yes)
    range: tuple[float, float] = (0.0, 1.0)  # of a number; another one is no answer
    of_all: bool = False  # P(yes) among all tokens, not against no alone
    max_tokens: int = 1
    system: str = ""  # what is said before
    timeout: float = 60.0  # seconds of one answer, if the judge is given none


# a number that is not an end of the scale, as the 5 of "4/5", "4 out of 5", "from 1 to 5" and "1-5"
ALONE = rf"(?<![\d./-])(?<!/ )(?<!\bof )(?<!\bto )(?<!\bfrom ){NUMBER}"


def _axis(name: str) -> str:
    """The number behind a name, which Markdown may set in bold."""
    return rf"{name} Score(?:[\s*_]*\(1-5\))?[\s:*_]*{NUMBER}"


RATIONAL_AXES = ("Text Faithfulness", "Physical and Visual Quality", "Text Rendering")


def _section(name: str) -> str:
    """The first score under a heading of RationalRewards, before the next heading."""
    begin, end = rf"^\W*\d\.\W*{name}\b", rf"^\W*\d\.\W*(?:{'|'.join(RATIONAL_AXES)})\b|^\W*Summary\b"
    return rf"(?ms){begin}(?:(?!{end}).)*?^\W*Score\s*:\W*?({NUMBER[1:-1]}|N/A)"


TEMPLATES = {
    "yes": Template('Does this picture show "{prompt}"? Answer yes or no.'),
    "vqascore": Template('Does this figure show "{prompt}"? Please answer Yes or No.', of_all=True),
    "score": Template(
        'How well does this picture show "{prompt}", from 1 (not at all) to 5 (exactly)? Answer with the number alone.',
        (ALONE,),
        (1, 5),
        max_tokens=8,
    ),
    "unified-reward": Template(  # as its model card asks: https://huggingface.co/CodeGoat24/UnifiedReward-7b-v1.5 (MIT)
        "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
        "based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
        "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, "
        "color accuracy, and overall aesthetic appeal.\n"
        "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]",
        (_axis("Final"),),
        (1, 5),
        max_tokens=512,
    ),
    "unified-reward-2": Template(  # https://huggingface.co/CodeGoat24/UnifiedReward-2.0-qwen-7b (MIT)
        "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
        "across multiple dimensions in relation to the caption. Specifically:\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
        "- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, "
        "etc.).\n"
        "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
        "Output your evaluation using the format below:\n\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]",
        (_axis("Alignment"), _axis("Coherence"), _axis("Style")),
        (1, 5),
        max_tokens=512,
    ),
    # RationalRewards-8B-T2I (Apache-2.0, https://arxiv.org/abs/2604.11626): the axes, the scale, the headings and where
    # the picture stands are its authors' (https://github.com/TIGER-AI-Lab/RationalRewards), the wording is ours
    "rational-rewards": Template(
        "User Instruction: {prompt}\nYou are provided with one image:\n1. Generated Image {picture}\n\n"
        "Judge the image on three aspects. Give each a score from 1 to 4, as a decimal number, and justify it.\n\n"
        "1. Text Faithfulness: does the image show what the instruction asks for? 4: everything, as described, and "
        "nothing else. 3: a detail is missing or wrong. 2: something important is missing, changed or misunderstood. "
        "1: it contradicts or ignores the instruction.\n"
        "2. Physical and Visual Quality: is it plausible and free of technical flaws? 4: no flaw can be seen. 3: small "
        "flaws that do not disturb. 2: clear errors of perspective, light, edges or anatomy. 1: errors that spoil the "
        "image.\n"
        "3. Text Rendering, only if the instruction asks for written text. 4: correct, legible and well placed. 3: "
        "small misspellings. 2: large misspellings or distortions. 1: unreadable or missing. Write N/A if no text is "
        "asked for.\n\n"
        "For each aspect choose the level that fits, then name the flaws that you see, and move the score by decimals "
        "accordingly. At the end write a request that avoids the weaknesses that you found.\n\n"
        "Answer in this format:\n"
        "# User Request Analysis\n[what the request asks for and implies]\n"
        "# Detailed Judgement\n"
        "1. Text Faithfulness:\n## Justification: [reasons]\n## Score: [number]\n"
        "2. Physical and Visual Quality:\n## Justification: [reasons]\n## Score: [number]\n"
        "3. Text Rendering:\n## Justification: [reasons]\n## Score: [number or N/A]\n"
        "# Summary: [summary]\n\n"
        "# User Request Refinement:\n## Refinement Comments: [what to change]\n## Refined Request: [the new request]",
        tuple(_section(name) for name in RATIONAL_AXES),
        (1, 4),
        max_tokens=4096,
        system="You are an expert who evaluates generated images: how well an image does what a user's instruction "
        "asks for. Afterwards you suggest how the request could be written to get a better image.",
        timeout=300.0,
    ),
}


def template_named(name: str) -> Template:
    """The template of that name, of a JSON file with the fields of `Template`, or a question that is answered by yes or
    no. Raises ValueError for a file that is not a template, and for a question without {prompt}."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.endswith(".json"):
        return _of_file(Path(name))
    if "{prompt}" not in name:
        known = unknown("template", name, TEMPLATES)
        raise RewardError(f"{known}; or give a question with {{prompt}} in it, or a .json file of a template")
    return Template(name)


def of_template(about: Entry, options: Mapping[str, Any]) -> Entry:
    """What is known of the judge whose template the options name."""
    return replace(about, range=template_named(str(options.get("template", "yes"))).range)


def _of_file(path: Path) -> Template:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        made = Template(
            **{**about, "patterns": tuple(about.get("patterns", ())), "range": tuple(about.get("range", (0, 1)))}
        )
        for pattern in made.patterns:
            if re.compile(pattern).groups != 1:
                raise RewardError(f"the pattern {pattern!r} does not have one group, the number")
        low, high = map(float, made.range)
        if "{prompt}" not in made.question or low >= high:
            raise RewardError("a question needs {prompt} in it, and a range is two numbers")
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        names = ", ".join(f.name for f in fields(Template))
        raise RewardError(f"{path} is not a template ({error}): write an object with some of {names}") from error
    return made


def read_answer(answer: Any, template: Template) -> float:
    """The score of a chat completion. Raises ValueError for one that gives none."""
    try:
        choice = answer["choices"][0]
        if template.patterns:
            return numbers_of(choice["message"]["content"], template)
        return probability_of_yes(choice["logprobs"]["content"][0]["top_logprobs"], template.of_all)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        wanted = "choices[0].message.content" if template.patterns else "choices[0].logprobs.content[0].top_logprobs"
        raise RewardError(f"it answered without {wanted}") from error


def probability_of_yes(tokens: Sequence[Mapping[str, Any]], of_all: bool) -> float:
    """P(yes) / (P(yes) + P(no)), or P(yes), over the tokens that are told; a token that is not told counts 0."""
    chance = {"yes": 0.0, "no": 0.0}
    for told in tokens:
        word, logarithm = told["token"].strip().lower(), told["logprob"]
        if word in chance and type(logarithm) in (int, float):
            if math.isnan(logarithm):
                raise RewardError(f"the log-probability that it tells of {word!r} is no number")
            chance[word] += math.exp(min(logarithm, 0.0))
    if not any(chance.values()):
        raise RewardError("neither yes nor no is among the tokens that it might have answered")
    return chance["yes"] if of_all else chance["yes"] / (chance["yes"] + chance["no"])


def numbers_of(text: str, template: Template) -> float:
    """The mean of the numbers that the patterns find, the last of each; N/A is left out.

    Raises ValueError if one is missing or outside the range.
    """
    low, high = template.range
    last = [re.findall(pattern, text, re.IGNORECASE)[-1:] for pattern in template.patterns]
    found = [float(said[0]) for said in last if said and said[0].upper() != "N/A"]
    if not all(last) or not found or not all(low <= number <= high for number in found):
        raise RewardError(f"its answer has no score from {low:g} to {high:g}: {client.quoted(text)}")
    return sum(found) / len(found)
