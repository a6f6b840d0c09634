"""Two models as the API tests know them: one that corrects, one that refuses."""

from pathlib import Path

from deployments.protocol.card import ModelCard, load_card

ROOT = Path(__file__).parents[3]

SCHNELL = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
LICENCE = {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
SKETCH = ModelCard.model_validate(
    {
        "id": "sketch",
        "name": "Sketch",
        "family": "sd",
        "aliases": ["someone/sketch"],
        "weights": {"path": "models/sketch"},
        "tasks": ["t2i", "i2i", "refine"],
        "steps": {"min": 1, "default": 20, "max": 50},
        "guidance": {"min": 0.0, "default": 7.0, "max": 20.0},
        "sizes": {
            "width": 128,
            "height": 128,
            "multiple": 16,
            "min": 64,
            "max": 512,
            "max_pixels": 131072,
        },
        "controls": {
            "canny": {"weights": {"path": "models/sketch-canny"}, "licence": LICENCE},
            "depth": {"weights": {"path": "models/sketch-depth"}, "licence": LICENCE},
        },
        "refiner": "sketch-refiner",
        "licence": LICENCE,
    }
)
CARDS = {card.id: card for card in (SCHNELL, SKETCH)}
