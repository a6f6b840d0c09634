"""`weft bench MODEL`: how many rows per second the device of this machine computes, by batch size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import NotFound, WeftError
from serve_app.card_settings import known_cards
from serve_app.cli.visible_gpus import as_replica
from serve_app.settings import Settings

LAST_LINES = 20  # of the messages of a process that broke
ROOT = Path(__file__).resolve().parents[2]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class BenchFailed(WeftError):
    kind = "bench_failed"


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Id or alias of a card.")],
    seconds: Annotated[int, typer.Option(min=1, help="No larger batch size is begun after so long.")] = 300,
) -> None:
    """Load a model as planned for this machine, measure its steps by batch size, and keep the profile.

    The profile is kept beside the weights. A replica on the same device reads it at its start, so that its
    first requests share forwards at once. Nothing else should use the device meanwhile.
    """
    settings = Settings.load()
    card = _card_named(model, known_cards(settings))
    sizes = card.sizes
    device, visible = as_replica(settings.model_device, card.serving.num_gpus)
    print(f"{card.id}, {sizes.width}x{sizes.height}", flush=True)
    job = {
        "card": card.model_dump(mode="json"),
        "installation": asdict(replace(settings.installation, device=device)),
        "limit_s": seconds,
    }
    profile, file = _measure(json.dumps(job, default=_plain), visible)
    for line in _summary(profile):
        print(line)
    print(f"kept in {file}")


def _card_named(model: str, cards: dict[str, ModelCard]) -> ModelCard:
    found = next((card for card in cards.values() if model == card.id or model in card.aliases), None)
    if found is None:
        raise NotFound(f"there is no model {model!r}; there is {', '.join(cards)}")
    return found


def _measure(job: str, environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The profile and its file; each batch size is printed as it is measured. In a process of its own, with
    these variables: this one is to import no torch. Raises BenchFailed with what it says."""
    command, pipe = [sys.executable, "-m", "deployments.bench"], subprocess.PIPE
    variables = {**os.environ, **environment}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as messages,  # libraries say much
        subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=pipe, stdout=pipe, stderr=messages, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already, and its status says so
            process.stdin.write(job)
            process.stdin.close()
        print(f"{'rows':>5} {'s/step':>9} {'rows/s':>9}", flush=True)
        for line in process.stdout:
            found = _parsed(line)
            if "rows" in found:
                rows, step_s = found["rows"], found["seconds"]
                print(f"{rows:5} {step_s:9.4f} {rows / step_s:9.2f}", flush=True)
            elif "profile" in found:
                return found["profile"], found["file"]
            elif "error" in found:
                raise BenchFailed(found["error"])
        status = process.wait()
        messages.seek(0)
        last = "".join(messages.readlines()[-LAST_LINES:])
    raise BenchFailed(f"the process that measures ended with status {status}: {last}")


def _parsed(line: str) -> dict[str, Any]:
    """Empty for a line that is not of `deployments.bench`: libraries print, too."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _summary(profile: dict[str, Any]) -> list[str]:
    step_s = {int(rows): seconds for rows, seconds in profile["step_s"].items()}
    best = max(step_s, key=lambda rows: rows / step_s[rows])
    alone = min(step_s)
    gain = best / step_s[best] / (alone / step_s[alone])
    return [
        f"most rows per second: {best} at a time, {gain:.2f} times those of {alone}",
        f"prompt of one request {profile['encode_s']:.3f} s, one decoded picture {profile['decode_s']:.3f} s",
    ]


def _plain(value: Any) -> str:
    """Secrets go to the child by its standard input, which no one else can read."""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
