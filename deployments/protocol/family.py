"""The family of a pipeline class: a word for people, from which little is decided."""

from __future__ import annotations

import re

SHORT = (("stable_diffusion_xl", "sdxl"), ("stable_diffusion", "sd"))  # in cards and LoRA files
# parts of class names that say what a pipeline does, not which model it runs
_VARIANTS = re.compile(
    "(Modular)?Pipeline$|Img2Img|ImageToVideo|VideoToVideo|ToVideo|TextToImage|Inpaint(ing)?|ControlNet|Control|"
    "Condition(ing)?|Kontext|Fill|Edit|Plus|Layered|PAG|Auto(?=[A-Z])"
)
_WORDS = re.compile("[A-Z]+(?![a-z])[0-9]*|[A-Z][a-z]+[0-9]*|[0-9]+")


def family_of(pipeline_class: str) -> str:
    """The family in snake case: "flux" of FluxKontextPipeline, "qwen_image" of QwenImageEditPlusPipeline."""
    name = "_".join(_WORDS.findall(_VARIANTS.sub("", pipeline_class))).lower()
    for long, short in SHORT:
        if name == long or name.startswith(f"{long}_"):
            return short + name.removeprefix(long)
    return name


def is_of_family(family: str, pipeline_class: str) -> bool:
    """Whether a pipeline of this class runs models of the family, or of a kind of it (wan_vace of wan)."""
    found = family_of(pipeline_class)
    return found == family or found.startswith(f"{family}_")
