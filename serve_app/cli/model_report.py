"""The models of a service that has just started: how each runs, or why it cannot, for its operator."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

from serve_app.setting_values import without_secrets
from serve_app.settings import Settings

ASK_TIMEOUT_S = 10.0


def model_report(host: str, port: int, prefix: str, settings: Settings) -> Iterator[str]:
    """A sentence for each model that is loaded or could not be. None where the service does not answer.

    host, port, prefix: where it listens; prefix: path of its application, without a slash at its end.
    """
    name = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}{prefix}/api/models/"
    call = urllib.request.Request(address)
    if settings.api_key is not None:
        call.add_header("Authorization", f"Bearer {settings.api_key.get_secret_value()}")
    try:
        with urllib.request.urlopen(call, timeout=ASK_TIMEOUT_S) as answer:
            models = json.load(answer)["models"]
    except (OSError, ValueError, KeyError):  # such as of a service with another key, or a busy one
        return
    for model in models:
        if (failure := model["failure"]) is not None:
            yield f"{model['id']} is not served: {without_secrets(failure['message'])}"
        elif (plan := model["plan"]) is not None and plan["loaded"]:
            yield f"{model['id']}: {plan['summary']}"
