"""Where this installation keeps things, its limits and its secrets: environment over configs/service.yaml."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from deployments.protocol.errors import BadRequest

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent  # the repository; cards and models live under it


class Settings(BaseSettings):
    """Frozen, read once by the process that builds the graph. An unknown key stops the start.

    Every field is an environment variable WEFT_<NAME>, and a key of configs/service.yaml.
    """

    model_config = SettingsConfigDict(
        env_prefix="WEFT_",
        env_ignore_empty=True,
        yaml_file=ROOT / "configs" / "service.yaml",
        extra="forbid",
        frozen=True,
        populate_by_name=True,
    )

    host: str | None = None  # `weft serve` binds here; None: http_options of serve_config.yaml
    port: int | None = Field(None, ge=1, le=65535)
    public_url: str = ""  # prefix of the links we hand out; empty: the caller's own Host
    api_key: SecretStr | None = None  # demanded on every call; needed when host is not loopback
    jwt_secret: SecretStr | None = Field(
        None, validation_alias=AliasChoices("jwt_secret", "WEFT_JWT_SECRET", "JWT_SECRET"), min_length=32
    )  # signs tokens and sessions; None: there are none
    ui: bool = True  # serve the page at /
    model_cache: Path | None = None  # of weights that cards name by address; None: ~/.cache/weft/models
    trace_dir: Path | None = None  # spans are written there where the Serve config turns tracing on

    data_dir: Path = Path("data")  # jobs and pictures; survives restarts
    cards_dir: Path = Path("configs/models")  # one YAML file per model
    redis_url: SecretStr | None = Field(
        None, validation_alias=AliasChoices("redis_url", "WEFT_REDIS_URL", "REDIS_URL")
    )  # None: the embedded Valkey
    redis_prefix: str = "weft:"
    results_url: str = ""  # an fsspec URL; empty: the bucket below, or {data_dir}/results
    s3_bucket_name: str = Field(
        "", validation_alias=AliasChoices("s3_bucket_name", "WEFT_S3_BUCKET_NAME", "S3_BUCKET_NAME")
    )  # where results go, under results/
    s3_region: str = Field(
        "", validation_alias=AliasChoices("s3_region", "WEFT_S3_REGION", "S3_REGION", "AWS_REGION")
    )  # Cloudflare R2: auto
    s3_endpoint_url: str = Field(
        "",
        validation_alias=AliasChoices(
            "s3_endpoint_url", "WEFT_S3_ENDPOINT_URL", "S3_ENDPOINT_URL", "S3_ENDPOINT", "AWS_ENDPOINT_URL"
        ),
    )  # of another maker's S3, such as https://<account>.r2.cloudflarestorage.com
    aws_access_key_id: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("aws_access_key_id", "WEFT_AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
    )  # None: as the machine's own role allows
    aws_secret_access_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices(
            "aws_secret_access_key", "WEFT_AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"
        ),
    )
    min_free_bytes: int = Field(256 * 2**20, ge=0)  # with less room on a local disk, jobs are refused

    lease_s: float = Field(30.0, gt=0)  # a job whose worker is silent for so long is given to another
    heartbeat_s: float = Field(5.0, gt=0)
    max_attempts: int = Field(3, ge=1)  # a job that kills its worker so often is failed
    max_pending: int = Field(256, ge=1)  # jobs waiting, all owners together
    max_active_per_owner: int = Field(64, ge=1)  # queued + processing
    record_ttl_s: int = Field(7 * 86_400, ge=60)  # an ended job is forgotten after
    events_kept: int = Field(256, ge=16)  # per job, for replay
    result_ttl_s: int = Field(86_400, ge=60)  # files of an ended job, and the cache of results
    once_ttl_s: int = Field(86_400, ge=60)  # an Idempotency-Key
    webhook_hosts: tuple[str, ...] = ()  # that may be told of endings: example.org, *.example.org, *
    cache: bool = True  # answer a repeated request of one owner, seed included, with the files there are

    submits_per_minute: int = Field(60, ge=1)  # of one owner; counted only where a key is demanded
    reads_per_minute: int = Field(1200, ge=1)  # of one owner; a page asks about two times a second
    logins_per_minute: int = Field(10, ge=1)  # and wrong keys, from one address
    max_concurrent_calls: int = Field(512, ge=1)  # that ask for pictures, of all owners on all replicas
    max_call_s: float = Field(420.0, gt=0)  # until an answer begins, whatever headers a client sends

    max_body_bytes: int = Field(32 * 2**20, ge=1024)
    max_json_depth: int = Field(32, ge=4)
    sync_wait_s: float = Field(300.0, gt=0)  # how long the synchronous dialects wait for a job

    fetch_hosts: str = (
        ""  # whose URLs of LoRAs are opened: "example.org, *.example.com", "*"; empty: nobody's
    )
    fetch_timeout_s: float = Field(120.0, gt=0)  # for one file, from the first byte to the last
    hub_loras: bool = False  # open LoRAs of huggingface.co by id
    hf_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("hf_token", "WEFT_HF_TOKEN", "HF_TOKEN", "HUGGINGFACE_HUB_TOKEN"),
    )  # goes to huggingface.co only
    max_adapter_bytes: int = Field(512 * 2**20, ge=1024, le=512 * 2**20)
    max_adapters_per_owner: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _leases_outlive_heartbeats(self) -> Self:
        if self.heartbeat_s > self.lease_s / 2:
            raise ValueError("heartbeat_s must be at most half of lease_s, or one late beat loses the job")
        if self.max_call_s <= self.sync_wait_s:
            raise ValueError("max_call_s must be more than sync_wait_s, or no long wait could be answered")
        return self

    @classmethod
    def load(cls, **values: object) -> Self:
        """Settings from `values`, the environment and configs/service.yaml, in this order.

        Relative folders lie under the repository, whatever the working directory of the process is.

        Raises BadRequest naming the variable or key that is unknown or not valid.
        """
        known = {f"WEFT_{name.upper()}" for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith("WEFT_") and name not in known)
        if os.environ.get("DATABASE_URL"):
            logger.warning(
                "DATABASE_URL is set and not used: jobs and their history are kept in Valkey (REDIS_URL); "
                "see docs/decisions/0008-history-in-valkey.md"
            )
        if unknown:
            raise BadRequest(f"unknown environment variable {', '.join(unknown)}; see serve_app/settings.py")
        try:
            settings = cls(**values)  # type: ignore[arg-type]
        except ValidationError as error:
            raise BadRequest(f"the settings are not valid: {error}") from error
        paths = {"data_dir": settings.data_dir, "cards_dir": settings.cards_dir}
        return settings.model_copy(
            update={name: (ROOT / path.expanduser()).resolve() for name, path in paths.items()}
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            YamlConfigSettingsSource(settings_cls),
        )

    @property
    def results_root(self) -> str:
        """fsspec URL or path of the folder that holds finished files."""
        if self.results_url:
            return self.results_url
        return (
            f"s3://{self.s3_bucket_name}/results" if self.s3_bucket_name else str(self.data_dir / "results")
        )

    @property
    def results_options(self) -> dict[str, Any]:
        """What fsspec is told of that place, beside its URL."""
        if not self.results_root.startswith("s3://"):
            return {}
        key, secret = self.aws_access_key_id, self.aws_secret_access_key
        return {
            "key": None if key is None else key.get_secret_value(),
            "secret": None if secret is None else secret.get_secret_value(),
            "endpoint_url": self.s3_endpoint_url or None,
            "client_kwargs": {"region_name": self.s3_region} if self.s3_region else {},
            # makers of other S3s know no checksums in trailers, which is what newer clients send
            "config_kwargs": {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "signature_version": "s3v4",
                "retries": {"total_max_attempts": 2},  # a worker tries its whole job again by itself
            },
        }

    @property
    def adapter_cache(self) -> Path:
        """Where replicas keep LoRA files that they fetched."""
        return self.data_dir / "adapter-cache"

    @property
    def auth_disabled(self) -> bool:
        """Nobody needs a key: only on loopback, and only when none is set."""
        return self.api_key is None
