"""The card of a model that has no card file."""

from __future__ import annotations

from deployments.protocol.card import Guidance, Licence, ModelCard, Sizes, Steps, Weights
from deployments.protocol.errors import BadRequest


def default_card(model_id: str, weights: Weights) -> ModelCard:
    """A card with the limits of FLUX.1-schnell for a model whose id or weights name FLUX.

    Raises BadRequest for every other model: its limits cannot be guessed.
    """
    name = f"{model_id} {weights.repo or weights.path}".lower()
    if "flux" not in name and "black-forest-labs" not in name:
        raise BadRequest(
            f"model {model_id!r} has no card; write configs/models/{model_id}.yaml "
            "(copy the card nearest to it)"
        )
    return ModelCard(
        id=model_id,
        name=model_id,
        family="flux",
        weights=weights,
        tasks=["t2i", "i2i", "inpaint"],
        steps=Steps(min=4, default=4, max=4),
        guidance=Guidance(min=0.0, default=0.0, max=0.0),
        sizes=Sizes(width=1024, height=1024),
        corrects=True,
        negative_prompt=False,
        max_sequence_length=256,
        vram_gib=33.0,
        licence=Licence(name="unknown", url="", commercial=False),
    )
