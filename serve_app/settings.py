"""Settings of the installation: folders, limits, secrets. The environment overrides configs/service.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, get_args

from pydantic import AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from deployments.protocol.card import Dtype, Quantisation
from deployments.protocol.errors import BadRequest
from deployments.protocol.events import CheckpointPolicy
from deployments.protocol.installation import Installation, S3Access
from deployments.protocol.signing_identity import SigningAlgorithm
from deployments.protocol.yaml_file import read_mapping
from serve_app.setting_values import (
    Aliases,
    DeviceName,
    Folder,
    Hosts,
    Names,
    Networks,
    Origins,
    Precision,
    Seconds,
    invalid_settings,
    unknown_variables,
)

ROOT = Path(__file__).resolve().parent.parent  # the repository, with cards and models
FILE = ROOT / "configs" / "service.yaml"
PATHS = (
    "data_dir",
    "cards_dir",
    "model_checkpoint_dir",
    "model_refiner_checkpoint_dir",
    "signing_certificates",
    "signing_key",
)


def _names_of(variable: str) -> AliasChoices:
    """The names of a setting that others use, too: its own, WEFT_<NAME>, and theirs."""
    return AliasChoices(variable.lower(), f"WEFT_{variable}", variable)


def _named(variable: str, **limits: int) -> Any:
    """A setting that is not set unless `variable` is."""
    return Field(None, validation_alias=_names_of(variable), **limits)  # type: ignore[call-overload]


class Settings(BaseSettings):
    """Frozen, and read once by the process that builds the graph. An unknown key is an error.

    Every field is an environment variable WEFT_<NAME>, and a key of configs/service.yaml.
    """

    model_config = SettingsConfigDict(
        env_prefix="WEFT_",
        env_ignore_empty=True,
        yaml_file=FILE,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
    )

    host: str | None = None  # address of `weft serve`; None: http_options of serve_config.yaml
    port: int | None = Field(
        None, ge=1, le=65535, validation_alias=AliasChoices("port", "WEFT_PORT", "BACKEND_PORT")
    )
    public_url: str = ""  # prefix of links in answers; empty: the Host header of the request
    trusted_proxies: Networks = ()  # whose X-Forwarded-For, -Proto, -Host and Forwarded count: 10.0.0.0/8
    api_key: SecretStr | None = None  # required of every call; must be set when host is not loopback
    jwt_secret: SecretStr | None = Field(
        None, validation_alias=AliasChoices("jwt_secret", "WEFT_JWT_SECRET", "JWT_SECRET"), min_length=32
    )  # signs tokens and sessions; None: no tokens
    ui: bool = True  # serve the page at /
    model_aliases: Aliases = Field(default_factory=dict)  # names that clients send, and the models they get
    cors_origins: Origins = ()  # web sites whose pages may call the API with a key: https://app.example.org
    model_cache: Path | None = None  # downloaded weights; None: ~/.cache/weft/models
    logical_gpus: bool = False  # Ray's --num-gpus names GPUs that are not there: models run on the CPU
    metadata_url: str = ""  # http://169.254.169.254 on a cloud with spot nodes: docs/reliability.md
    trace_dir: Path | None = None  # folder for spans, if the Serve config enables tracing

    # how models run: docs/machines.md
    model_checkpoint_dir: Folder | None = _named("MODEL_CHECKPOINT_DIR")  # folder of base models, or one
    model_refiner_checkpoint_dir: Folder | None = _named("MODEL_REFINER_CHECKPOINT_DIR")
    model_device: DeviceName | None = _named("MODEL_DEVICE")  # cuda, cuda:1, mps, cpu; None: the best one
    model_precision: Precision | None = _named("MODEL_PRECISION")  # a dtype, or the form of the weights
    model_max_batch_size: int | None = _named("MODEL_MAX_BATCH_SIZE", ge=1, le=64)  # rows of one forward
    enable_xformers: bool = Field(False, validation_alias=_names_of("ENABLE_XFORMERS"))

    # who signs finished files: docs/provenance.md
    content_credentials: bool = True  # write a signed C2PA manifest into every PNG, JPEG, WebP and MP4
    signing_certificates: Path | None = None  # file (PEM): the signer's certificate and its issuers'
    signing_key: Path | None = None  # file (PEM, PKCS #8) with the key
    signing_function: str = Field(
        "", pattern=r"^(|[\w.]+:\w+)$"
    )  # module:function that signs instead of a key
    signing_algorithm: SigningAlgorithm = "es256"
    timestamp_url: str = ""  # of an RFC 3161 authority, asked for every file
    credentials_with_prompt: bool = False  # state prompt and seed, too
    unsigned_users: Names = ()  # ids of users whose files are not signed

    data_dir: Path = Path("data")  # jobs and results; survives restarts
    cards_dir: Path = Path("configs/models")  # one YAML file per model
    redis_url: SecretStr | None = Field(
        None, validation_alias=AliasChoices("redis_url", "WEFT_REDIS_URL", "REDIS_URL")
    )  # None: the embedded Valkey
    redis_prefix: str = "weft:"
    results_url: str = ""  # an fsspec URL; empty: the bucket below, or {data_dir}/results
    s3_bucket_name: str = Field(
        "", validation_alias=AliasChoices("s3_bucket_name", "WEFT_S3_BUCKET_NAME", "S3_BUCKET_NAME")
    )  # bucket of results, under results/; the rest is for weights at s3:// addresses, too
    s3_region: str = Field(
        "",
        validation_alias=AliasChoices(
            "s3_region", "WEFT_S3_REGION", "S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"
        ),
    )  # Cloudflare R2: auto
    s3_endpoint_url: str = Field(
        "",
        validation_alias=AliasChoices(
            "s3_endpoint_url", "WEFT_S3_ENDPOINT_URL", "S3_ENDPOINT_URL", "S3_ENDPOINT", "AWS_ENDPOINT_URL"
        ),
    )  # of an S3-compatible storage, such as https://<account>.r2.cloudflarestorage.com
    aws_access_key_id: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("aws_access_key_id", "WEFT_AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
    )  # None: the role of the machine
    aws_secret_access_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices(
            "aws_secret_access_key", "WEFT_AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"
        ),
    )
    min_free_bytes: int = Field(256 * 2**20, ge=0)  # free disk space below which jobs are refused

    lease_s: Seconds = 30.0  # without a heartbeat for this long a job goes to another worker
    heartbeat_s: Seconds = 5.0
    max_attempts: int = Field(3, ge=1)  # attempts of a job before it fails
    checkpoint_interval_s: Seconds = 60.0  # of a running job; what is computed again when its node is lost
    checkpoint_max_bytes: int = Field(256 * 2**20, ge=0)  # of one; 0: only stopped replicas hand jobs over
    max_pending: int = Field(256, ge=1)  # waiting jobs of all owners
    max_active_per_owner: int = Field(64, ge=1)  # queued and processing
    record_ttl_s: int = Field(7 * 86_400, ge=60)  # lifetime of the record of an ended job
    events_kept: int = Field(256, ge=16)  # per job, for replay
    result_ttl_s: int = Field(86_400, ge=60)  # files of an ended job, and the result cache
    usage_kept_days: int = Field(400, ge=1, le=3_660)  # totals of what jobs used
    idempotency_ttl_s: int = Field(86_400, ge=60)  # how long an Idempotency-Key is remembered
    webhook_hosts: Hosts = ()  # allowed targets of webhooks: example.org, *.example.org, *
    cache: bool = True  # answer an owner's identical request (same seed) with the existing files

    submits_per_minute: int = Field(60, ge=1)  # of one owner; counted only while a key is required
    reads_per_minute: int = Field(1200, ge=1)  # of one owner; the page sends about two per second
    logins_per_minute: int = Field(10, ge=1)  # and wrong keys, of one address
    max_concurrent_calls: int = Field(512, ge=1)  # that submit jobs, of all owners on all replicas
    max_call_s: Seconds = 420.0  # until an answer begins, whatever timeout header a client sends

    max_body_bytes: int = Field(32 * 2**20, ge=1024)
    max_json_depth: int = Field(32, ge=4)
    sync_wait_s: Seconds = 300.0  # that synchronous endpoints wait for a job

    fetch_hosts: Hosts = ()  # hosts whose LoRA URLs are opened: example.org, *.example.com, *
    fetch_timeout_s: Seconds = 120.0  # for one file, from first to last byte
    hub_loras: bool = False  # accept LoRAs of huggingface.co by id
    hf_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices(
            *("hf_token", "WEFT_HF_TOKEN", "HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        ),
    )  # for weights and LoRAs; sent to the hub only
    pytorch_hip_alloc_conf: str = Field(
        "",
        validation_alias=AliasChoices(
            "pytorch_hip_alloc_conf", "WEFT_PYTORCH_HIP_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"
        ),
    )  # of torch's allocator on AMD GPUs
    max_adapter_bytes: int = Field(2 * 2**30, ge=1024, le=2 * 2**30)
    max_adapters_per_owner: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _leases_outlive_heartbeats(self) -> Self:
        if self.heartbeat_s > self.lease_s / 2:
            raise ValueError("heartbeat_s must be at most half of lease_s, or a late heartbeat loses the job")
        if self.max_call_s <= self.sync_wait_s:
            raise ValueError("max_call_s must be more than sync_wait_s, or long waits could not be answered")
        return self

    @classmethod
    def load(cls, **values: object) -> Self:
        """Settings from `values`, the environment and configs/service.yaml, in this order.

        Relative folders are relative to the repository, not to the working directory.

        Raises BadRequest naming the variable or key that is unknown or not valid.
        """
        if unknown := unknown_variables(cls.model_fields):
            raise BadRequest(unknown)
        if FILE.exists():
            read_mapping(FILE)
        try:
            settings = cls(**values)  # type: ignore[arg-type]
        except ValidationError as error:
            # not `from error`: its text has the values of secrets
            raise BadRequest(invalid_settings(error, cls.model_fields, values)) from None
        except SettingsError as error:
            raise BadRequest(f"the settings cannot be read: {error}") from None
        paths: dict[str, Path | None] = {name: getattr(settings, name) for name in PATHS}
        return settings.model_copy(
            update={name: (ROOT / path.expanduser()).resolve() for name, path in paths.items() if path}
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  pydantic passes these by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            YamlConfigSettingsSource(settings_cls),
        )

    @property
    def precision_dtype(self) -> Dtype | None:
        """The dtype of weights that MODEL_PRECISION asks for; None: that of each card."""
        return next((dtype for dtype in get_args(Dtype) if dtype == self.model_precision), None)

    @property
    def precision_quantisation(self) -> Quantisation | None:
        """The form of weights that MODEL_PRECISION asks for; None: that of each card."""
        return next((form for form in get_args(Quantisation) if form == self.model_precision), None)

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
        """Further arguments of fsspec for `results_root`."""
        if not self.results_root.startswith("s3://"):
            return {}
        return self._s3.options

    @property
    def installation(self) -> Installation:
        """What replicas and downloads of weights need of these settings, on every node."""
        return Installation(
            hub_token=self.hf_token,
            s3=self._s3,
            model_cache=self.model_cache,
            device=self.model_device,
            hip_alloc_conf=self.pytorch_hip_alloc_conf,
            logical_gpus=self.logical_gpus,
            metadata_url=self.metadata_url.rstrip("/"),
        )

    @property
    def checkpoints(self) -> CheckpointPolicy | None:
        """Which states dispatchers ask the replicas for."""
        if not self.checkpoint_max_bytes:
            return None
        return CheckpointPolicy(self.checkpoint_interval_s, self.checkpoint_max_bytes)

    @property
    def _s3(self) -> S3Access:
        return S3Access(
            self.aws_access_key_id, self.aws_secret_access_key, self.s3_endpoint_url, self.s3_region
        )

    @property
    def adapter_cache(self) -> Path:
        """Folder in which replicas cache LoRA files."""
        return self.data_dir / "adapter-cache"

    @property
    def auth_disabled(self) -> bool:
        """Whether no key is required; then only loopback is answered."""
        return self.api_key is None
