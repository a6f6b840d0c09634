"""`weft models add`: a checkpoint in one file, or a folder of them, becomes models with cards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, Conflict, WeftError
from deployments.protocol.family import family_of, is_of_family
from deployments.protocol.invalid_values import wrong_values
from serve_app.settings import ROOT, Settings

LAST_LINES = 20  # of the messages of a process that broke
MAX_ID_CHARS = 64
SUFFIX = ".safetensors"
OF_ITS_OWN = {
    "id",
    "name",
    "description",
    "aliases",
    "weights",
    "licence",
    "adapters",
    "trigger_words",
    "refiner",
}
UNKNOWN_LICENCE = "not stated"
FACTORS = {
    "unet": 8,
    "transformer": 16,
}  # pixels of a picture by one of the denoiser's, without a card to go by


class ImportFailed(WeftError):
    kind = "import_failed"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for each file."""

    source: str | None  # folder or hub repository of the configuration; None: found by the file
    dtype: str
    licence: str
    folder: Path  # of the models that are made
    replace: bool


def files_in(path: Path) -> list[Path]:
    """The checkpoint itself, or those in this folder. Raises BadRequest where there is none."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(f"*{SUFFIX}"))
    if not found:
        raise BadRequest(f"there is no {SUFFIX} file in {path}; name a file, or the folder that holds them")
    return found


def model_id_of(file: Path) -> str:
    """The id of the model, by the name of the file: "juggernautxl-v9" of Juggernaut_XL v9.safetensors."""
    name = re.sub(r"[^a-z0-9.]+", "-", file.stem.lower()).strip("-.")
    if not name:
        raise BadRequest(f"no id can be made of the name {file.name!r}; give one with --name")
    return name[:MAX_ID_CHARS].rstrip("-.")


def add_model(
    file: Path, model_id: str, wanted: Wanted, cards: Mapping[str, ModelCard], settings: Settings
) -> Iterator[str]:
    """Import the file and write its card; the lines to be printed.

    Raises Conflict where there is such a model already, ImportFailed with the reason.
    """
    card_file, target = settings.cards_dir / f"{model_id}.yaml", wanted.folder / model_id
    if not wanted.replace and (model_id in cards or card_file.exists() or target.exists()):
        raise Conflict(f"there is a model {model_id} already; give another name with --name, or --replace")
    yield f"{file.name}: importing as {model_id} into {target}"
    making = target.with_name(f"{target.name}.new") if target.exists() else target
    found = _run_import(
        {
            "file": str(file.absolute()),
            "source": wanted.source,
            "target": str(making.absolute()),
            "dtype": wanted.dtype,
            "installation": asdict(settings.installation),
        }
    )
    if making != target:
        _exchange(making, target)
    card = card_of(model_id, file, target.absolute(), found, wanted, cards)
    card_file.parent.mkdir(parents=True, exist_ok=True)
    card_file.write_text(card, encoding="utf-8")
    given = ", ".join(found["from_source"])
    yield f"  {found['pipeline_class']}: {', '.join(found['from_file'])} from the file" + (
        f"; {given} from {found['source']}" if given else ""
    )
    yield from (f"  {note}" for note in found["notes"])
    if wanted.licence == UNKNOWN_LICENCE:
        yield "  warning: its licence is not known; read it at the file's source, and write it into the card"
    yield f"  card: {card_file}; add {model_id} to models of the Serve config to serve it"


def card_of(
    model_id: str,
    file: Path,
    folder: Path,
    found: Mapping[str, Any],
    wanted: Wanted,
    cards: Mapping[str, ModelCard],
) -> str:
    """The card as YAML: limits and defaults are those of the card of the same kind. Raises BadRequest."""
    like = _like(found, cards.values())
    fields: dict[str, Any] = {}
    if like is not None:
        fields = like.model_dump(mode="json", exclude_defaults=True, exclude=OF_ITS_OWN)
    else:
        fields = _by_configuration(folder, str(found["pipeline_class"]))
    fields = {
        "id": model_id,
        "name": file.stem,
        "description": f"Imported from {file.name}"
        + ("." if like is None else f"; limits and defaults as {like.id}."),
        **fields,
        "weights": {"path": str(folder), "dtype": wanted.dtype},
        "licence": {"name": wanted.licence, "url": ""},
    }
    try:
        ModelCard.model_validate(fields)
    except ValidationError as error:
        fault = wrong_values(error, ModelCard.model_fields)
        raise BadRequest(f"no card can be made for {file.name}: {fault}") from None
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)


def _like(found: Mapping[str, Any], cards: Iterable[ModelCard]) -> ModelCard | None:
    """The card of a model with the same configuration, else of the same family; None: there is none."""
    source, kind = str(found["source"]), str(found["pipeline_class"])
    plain = [card for card in cards if not card.weights.gguf]
    for card in plain:
        path = card.weights.path
        if card.weights.repo == source or (path and (ROOT / path).resolve() == Path(source).resolve()):
            return card
    known = [card for card in plain if card.family is not None and is_of_family(card.family, kind)]
    return next((card for card in known if card.weights.repo is not None), None)


def _by_configuration(folder: Path, pipeline_class: str) -> dict[str, Any]:
    """What a card needs for a model like which there is none. Raises BadRequest for one of videos."""
    denoiser = next(name for name in FACTORS if (folder / name).is_dir())
    config = json.loads((folder / denoiser / "config.json").read_bytes())
    side = config.get("sample_size")
    if config.get("num_frames") or "3D" in str(config.get("_class_name")):
        raise BadRequest(
            f"there is no card of the family {family_of(pipeline_class)} to take the limits of videos from; "
            f"write one with weights: {{path: {folder}}}"
        )
    size = side * FACTORS[denoiser] if isinstance(side, int) else 1024
    return {
        "family": family_of(pipeline_class),
        "tasks": ["t2i"],
        "steps": {"min": 1, "default": 30, "max": 100},
        "guidance": {"min": 0.0, "default": 5.0, "max": 20.0},
        "sizes": {"width": size, "height": size, "min": size // 2, "max": size * 2, "multiple": 16},
        "serving": {"num_gpus": 1, "min_replicas": 0},
    }


def _exchange(new: Path, old: Path) -> None:
    """Put the new folder in the place of the old one, which is removed."""
    gone = old.with_name(f"{old.name}.old")
    old.rename(gone)
    new.rename(old)
    shutil.rmtree(gone)


def _run_import(job: Mapping[str, Any]) -> dict[str, Any]:
    """What became of the file, by a process of its own: this one is to import no torch.

    Raises ImportFailed.
    """
    command = [sys.executable, "-m", "deployments.import_checkpoint"]
    with tempfile.TemporaryFile("w+", errors="replace") as messages:  # libraries say much
        done = subprocess.run(
            command,
            cwd=ROOT,
            input=json.dumps(job, default=_plain),
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            check=False,
        )
        messages.seek(0)
        last = "".join(messages.readlines()[-LAST_LINES:])
    answer = _answer(done.stdout)
    if "error" in answer:
        raise ImportFailed(str(answer["error"]))
    if "imported" not in answer:
        raise ImportFailed(f"the process that imports ended with status {done.returncode}: {last}")
    found: dict[str, Any] = answer["imported"]
    return found


def _answer(output: str) -> dict[str, Any]:
    """The last line, if it is the answer: libraries print, too."""
    try:
        found = json.loads(output.rstrip().rpartition("\n")[2])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> str:
    """Secrets go to the child by its standard input, which no one else can read."""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
