"""What tests read in manifests: schemas that refuse typing errors, and the longest job of a Serve config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deployments.protocol.card import Serving

CARDS = Path(__file__).parents[2] / "configs/models"


def strict(schema: Any) -> Any:
    """The same schema, refusing fields that it does not name: a typing error must not pass in silence."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "type" in made:
        made.setdefault("additionalProperties", False)
    return made


def longest_job_s(serve_config: Mapping[str, Any]) -> float:
    """The longest that a job of any model of this config may take."""
    longest = 0.0
    for application in serve_config["applications"]:
        for model in application["args"].get("models", []):
            card = yaml.safe_load((CARDS / f"{model['id']}.yaml").read_text(encoding="utf-8"))
            serving = card.get("serving", {}) | model.get("serving", {})
            longest = max(longest, serving.get("job_timeout_s", Serving().job_timeout_s))
    return longest
