"""Settings: environment over file over defaults; what is not known or not sane stops the start."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from pydantic import AliasChoices, SecretStr

from deployments.protocol.card import load_cards
from deployments.protocol.errors import BadRequest
from deployments.protocol.installation import Installation, S3Access
from serve_app.app import _fetchers, _models
from serve_app.cli.serve import greeting, required_key
from serve_app.settings import ROOT, Settings

CARDS = ROOT / "configs/models"


def test_relative_folders_lie_under_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEFT_DATA_DIR", "somewhere")

    settings = Settings.load()

    assert settings.data_dir == ROOT / "somewhere"
    assert settings.results_root == str(ROOT / "somewhere" / "results")


def test_redis_url_is_read_under_its_usual_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:sesame@host/0")

    settings = Settings.load()

    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://:sesame@host/0"
    assert "sesame" not in repr(settings)


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_MAX_PENDIN", "3")

    with pytest.raises(BadRequest, match="WEFT_MAX_PENDIN"):
        Settings.load()


def test_a_value_that_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_MAX_PENDING", "many")

    with pytest.raises(BadRequest, match=r"WEFT_MAX_PENDING \('many'\) must be a whole number"):
        Settings.load()


def test_a_heartbeat_slower_than_the_lease_is_refused() -> None:
    with pytest.raises(BadRequest, match="heartbeat_s must be at most half of lease_s"):
        Settings.load(lease_s=2.0, heartbeat_s=5.0)


def test_on_loopback_no_key_is_demanded(tmp_path: Path) -> None:
    settings = Settings.load(data_dir=tmp_path)

    assert required_key(settings, "127.0.0.1") is None
    assert required_key(settings, "localhost") is None
    assert required_key(settings, "::1") is None


def test_elsewhere_a_key_is_made_kept_private_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_API_KEY", "")  # restored afterwards: the key is handed on through it
    settings = Settings.load(data_dir=tmp_path)

    key = required_key(settings, "0.0.0.0")
    again = required_key(settings, "0.0.0.0")

    assert key is not None
    assert key.text is not None
    assert len(key.text) >= 32
    assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600
    assert (tmp_path / "api_key").read_text() == key.text
    assert again is not None
    assert again.text is None  # shown by the start that made it, and never again
    api_key = Settings.load().api_key
    assert api_key is not None
    assert api_key.get_secret_value() == key.text


def test_a_key_is_shown_by_the_start_that_made_it_and_the_operators_own_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"applications": [{"route_prefix": "/"}]}
    monkeypatch.setenv("WEFT_API_KEY", "sesame" * 6)
    own = required_key(Settings.load(data_dir=tmp_path), "0.0.0.0")
    monkeypatch.setenv("WEFT_API_KEY", "")
    settings = Settings.load(data_dir=tmp_path)
    new = required_key(settings, "0.0.0.0")
    old = required_key(settings, "0.0.0.0")
    generated = (tmp_path / "api_key").read_text()

    assert "sesame" not in greeting("0.0.0.0", 8000, own, config)
    assert "$WEFT_API_KEY" in greeting("0.0.0.0", 8000, own, config)
    assert generated in greeting("0.0.0.0", 8000, new, config)
    assert generated not in greeting("0.0.0.0", 8000, old, config)
    assert f"$(cat {tmp_path}/api_key)" in greeting("0.0.0.0", 8000, old, config)


def test_a_bucket_is_named_by_its_usual_variables_and_its_secrets_are_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "S3_BUCKET_NAME": "pictures",
        "S3_REGION": "auto",
        "S3_ENDPOINT_URL": "https://account.r2.cloudflarestorage.com",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "sesame",
    }.items():
        monkeypatch.setenv(name, value)

    settings = Settings.load()

    assert settings.results_root == "s3://pictures/results"
    assert settings.results_options["secret"] == "sesame"
    assert settings.results_options["client_kwargs"] == {"region_name": "auto"}
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_hubs_token_goes_to_replicas_on_other_nodes_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "hf_sesame")

    settings = Settings.load()
    travelled = settings.installation  # graph tests send it to replicas

    assert travelled.hub_token.get_secret_value() == "hf_sesame"
    assert "sesame" not in f"{settings!r} {travelled!r}"
    assert installation_of("flux.1-dev", settings) == travelled
    (fetcher,) = _fetchers(load_cards(CARDS), load_cards(CARDS), settings.installation)
    assert fetcher._bound_deployment.init_args[1] == travelled


def installation_of(model: str, settings: Settings) -> Installation:
    """What the replicas of a model are given."""
    known = load_cards(CARDS)
    bound = _models({model: known[model]}, known, installation=settings.installation)[model]
    given: Installation = bound._bound_deployment.init_kwargs["installation"]
    return given


def test_storage_cache_and_allocator_go_to_replicas_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "S3_ENDPOINT": "https://s3.example.org",
        "S3_REGION": "eu-1",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "sesame",
        "WEFT_MODEL_CACHE": str(tmp_path),
        "PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:64",
    }.items():
        monkeypatch.setenv(name, value)

    given = installation_of("flux.1-dev", Settings.load())

    assert given.s3 == S3Access(SecretStr("id"), SecretStr("sesame"), "https://s3.example.org", "eu-1")
    assert given.model_cache == tmp_path
    assert given.hip_alloc_conf == "max_split_size_mb:64"
    assert "sesame" not in repr(given)


def test_the_port_has_the_name_of_other_services_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_PORT", "8123")

    assert Settings.load().port == 8123
    monkeypatch.setenv("WEFT_PORT", "8124")
    assert Settings.load().port == 8124


def test_the_example_has_every_setting_once_with_its_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = re.findall(r"^# ([A-Z][A-Z0-9_]*=.*?) *(?:#.*)?$", (ROOT / ".env.example").read_text(), re.M)
    shown = dict(line.split("=", 1) for line in written)
    names = {
        alias: name
        for name, field in Settings.model_fields.items()
        for alias in (f"WEFT_{name.upper()}", *(field.validation_alias or AliasChoices("")).choices)
    }
    for name in (*names, *os.environ):
        if name in names or name.startswith("WEFT_"):
            monkeypatch.delenv(str(name), raising=False)
    monkeypatch.setattr("serve_app.settings.FILE", tmp_path / "none.yaml")
    defaults = Settings.load()

    for name, value in shown.items():
        monkeypatch.setenv(name, value)

    assert sorted(names[name] for name in shown) == sorted(Settings.model_fields)
    assert Settings.load() == defaults
