"""What stops `weft serve` before it starts anything: every cause has one sentence with its cure."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.protocol.errors import BadRequest
from serve_app.cli.main import main
from serve_app.cli.ports import check_address
from serve_app.cli.start_checks import check_folder
from serve_app.redis.reachable import check_redis
from serve_app.setting_values import without_secrets
from serve_app.settings import ROOT, Settings
from tests.patience import patience

CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
APPLICATION: dict[str, Any] = CONFIG["applications"][0]
CARD: dict[str, Any] = yaml.safe_load((ROOT / "configs/models/tiny-flux-schnell.yaml").read_text())
SECRET = "hunter2-and-no-more"


def application(**changes: object) -> dict[str, Any]:
    return CONFIG | {"applications": [APPLICATION | changes]}


def with_args(**changes: object) -> dict[str, Any]:
    return application(args=APPLICATION["args"] | changes)


@dataclass
class Cause:
    """One way to start `weft serve` that cannot work."""

    words: str  # of the sentence
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    config: dict[str, Any] | bytes | None = None  # of --config; None: the one that ships
    card: dict[str, Any] | bytes | None = None  # the only card; None: those that ship


def setting(name: str, value: str, words: str) -> Cause:
    return Cause(words, environment={name: value})


CAUSES = {
    # settings
    "a typing error in a setting": setting("WEFT_MAX_PENDIN", "3", "did you mean WEFT_MAX_PENDING?"),
    "a setting that is none": setting("WEFT_COLOUR", "red", "unknown environment variable WEFT_COLOUR"),
    "a port as text": setting("WEFT_PORT", "http", "WEFT_PORT ('http') must be a whole number"),
    "a port as text, other name": setting("BACKEND_PORT", "http", "BACKEND_PORT ('http') must be a whole"),
    "a port that is none": setting("WEFT_PORT", "70000", "WEFT_PORT ('70000') must be at most 65535"),
    "a boolean": setting("WEFT_UI", "maybe", "WEFT_UI ('maybe') must be true or false"),
    "a number": setting("WEFT_MAX_PENDING", "many", "WEFT_MAX_PENDING ('many') must be a whole number"),
    "a number out of range": setting("WEFT_EVENTS_KEPT", "1", "WEFT_EVENTS_KEPT ('1') must be at least 16"),
    "a duration with a unit": setting("WEFT_LEASE_S", "30s", "must be a number of seconds, without a unit"),
    "a duration in days": setting("WEFT_RESULT_TTL_S", "7d", "must be a whole number of seconds"),
    "an endless duration": setting("WEFT_SYNC_WAIT_S", "inf", "must be a number of seconds"),
    "durations that contradict": setting("WEFT_HEARTBEAT_S", "20", "at most half of lease_s"),
    "hosts with a scheme": setting("WEFT_WEBHOOK_HOSTS", "https://example.org", "without scheme"),
    "hosts as broken JSON": setting("WEFT_FETCH_HOSTS", '["example.org"', "is not a valid JSON list"),
    "a short JWT secret": setting("WEFT_JWT_SECRET", SECRET, "must have at least 32 characters"),
    "a short JWT secret, other name": setting("JWT_SECRET", SECRET, "JWT_SECRET must have at least 32"),
    "no folder of cards": setting("WEFT_CARDS_DIR", "/nowhere", "there is no folder /nowhere"),
    # how models run
    "a device that is none": setting("MODEL_DEVICE", "gpu", "MODEL_DEVICE ('gpu') must be cuda, cuda:1"),
    "a precision that is none": setting("MODEL_PRECISION", "fp17", "('fp17') must be float32, bfloat16"),
    "a batch of none": setting("MODEL_MAX_BATCH_SIZE", "0", "MODEL_MAX_BATCH_SIZE ('0') must be at least 1"),
    "no folder of models": setting("MODEL_CHECKPOINT_DIR", "/nowhere", "names /nowhere, which is not there"),
    "a model in one file": setting("MODEL_CHECKPOINT_DIR", __file__, "is a file, and models are read from"),
    "models at an address": setting("MODEL_CHECKPOINT_DIR", "s3://b/m", "must be a folder; a model at"),
    "no folder of a refiner": setting("MODEL_REFINER_CHECKPOINT_DIR", "/nowhere", "which is not there"),
    "xformers or not": setting("ENABLE_XFORMERS", "maybe", "ENABLE_XFORMERS ('maybe') must be true or"),
    # the data folder
    "a file in place of a folder": setting("WEFT_DATA_DIR", __file__, "it or one above it is a file"),
    "a folder in a file": setting("WEFT_DATA_DIR", f"{__file__}/data", "it or one above it is a file"),
    "a folder that cannot be made": setting("WEFT_DATA_DIR", "/proc/weft", "cannot be written"),
    "a cache in a file": setting("WEFT_MODEL_CACHE", f"{__file__}/c", "correct WEFT_MODEL_CACHE"),
    # results
    "half of a key": Cause(
        "AWS_SECRET_ACCESS_KEY is not set", environment={"S3_BUCKET_NAME": "b", "AWS_ACCESS_KEY_ID": "k"}
    ),
    "an endpoint without a bucket": setting("S3_ENDPOINT_URL", "https://x.example", "set S3_BUCKET_NAME too"),
    "a region without a bucket": setting("S3_REGION", "auto", "set S3_BUCKET_NAME too"),
    "an endpoint without a bucket, other name": setting("S3_ENDPOINT", "https://x.example", "S3_ENDPOINT is"),
    "half of a key for weights": Cause(
        "weights come from s3://weights/model, and AWS_ACCESS_KEY_ID is not set",
        environment={"AWS_SECRET_ACCESS_KEY": SECRET},
        config=with_args(models=[CARD["id"]]),
        card=CARD | {"weights": {"path": "s3://weights/model"}},
    ),
    "an endpoint without a scheme": Cause(
        "must begin with https://", environment={"S3_BUCKET_NAME": "b", "S3_ENDPOINT_URL": "x.example"}
    ),
    "results nowhere": setting("WEFT_RESULTS_URL", "s4://bucket", "WEFT_RESULTS_URL cannot be opened"),
    "results in a file": setting("WEFT_RESULTS_URL", __file__, "correct WEFT_RESULTS_URL"),
    # Ray's token
    "a missing token": setting("RAY_AUTH_TOKEN_PATH", "/nowhere/token", "RAY_AUTH_TOKEN_PATH names /nowhere"),
    "an unknown mode": setting("RAY_AUTH_MODE", "on", "RAY_AUTH_MODE is 'on'; set it to token"),
    # the store
    "no store": setting("REDIS_URL", f"redis://:{SECRET}@127.0.0.1:1/0", "no Redis can be reached"),
    "no such host": setting("REDIS_URL", "redis://store.invalid:6379", "store.invalid:6379"),
    "a store without a scheme": setting("REDIS_URL", "localhost:6379", "REDIS_URL has no scheme"),
    "a store by HTTP": setting("REDIS_URL", "http://localhost:6379", "REDIS_URL begins with http://"),
    "a slash in a password": setting("REDIS_URL", f"redis://:a/{SECRET}@h:1", "write those as %2F"),
    "a database by name": setting("REDIS_URL", "redis://localhost/jobs", "number of a database"),
    "an option that is none": setting("REDIS_URL", "redis://localhost:1?pool=3", "option that is not known"),
    "an option of another kind": setting("REDIS_URL", "redis://h:1?socket_timeout=x", "socket_timeout"),
    "a socket that is none": setting("REDIS_URL", "unix:///nowhere.sock", "/nowhere.sock"),
    # the address
    "port 0": Cause("the port for HTTP is 0", arguments=["--port", "0"]),
    "port 70000": Cause("the port for HTTP is 70000", arguments=["--port", "70000"]),
    "a negative port": Cause("the port for HTTP is -1", arguments=["--port", "-1"]),
    "a port of the config": Cause("is 'http'", config=CONFIG | {"http_options": {"port": "http"}}),
    "an address of another machine": Cause(
        "192.0.2.254 is not an address of this machine", arguments=["--host", "192.0.2.254"]
    ),
    "an address that is none": Cause("is not known on this machine", arguments=["--host", "no host"]),
    # the config
    "a config that is not there": Cause("no file /nowhere.yaml", arguments=["--config", "/nowhere.yaml"]),
    "a config that is a folder": Cause(f"{ROOT} is a folder", arguments=["--config", str(ROOT)]),
    "an empty config": Cause("is empty", config=b""),
    "a config of comments": Cause("is empty", config=b"# nothing yet\n"),
    "a binary config": Cause("is not a text file", config=b"\x89PNG\r\n\x1a\n\x00\xff"),
    "a config with control characters": Cause("is not valid YAML", config=b"a: \x07"),
    "a broken config": Cause("line 3 is not valid YAML", config=b"applications:\n  - [1\nx: }"),
    "a deep config": Cause("is not valid YAML", config=b"[" * 5000),
    "a config that is a list": Cause("keys and values", config=b"- a\n- b\n"),
    "no applications": Cause("has no applications", config=CONFIG | {"applications": []}),
    "applications that are none": Cause("has no applications", config=CONFIG | {"applications": "weft"}),
    "an application that is none": Cause("no import_path", config=CONFIG | {"applications": ["weft"]}),
    "a typing error in a key": Cause("did you mean applications?", config={"aplications": []}),
    "a typing error in an application": Cause("did you mean args?", config=application(arg={})),
    "a typing error in http_options": Cause(
        "did you mean port?", config=CONFIG | {"http_options": {"prot": 1}}
    ),
    "two applications of one name": Cause(
        "have the same name", config=CONFIG | {"applications": [APPLICATION, APPLICATION]}
    ),
    "an import path without a name": Cause("write module:function", config=application(import_path="weft")),
    "a module that is none": Cause(
        "not installed (serve_ap.app)", config=application(import_path="serve_ap.app:build")
    ),
    "a function that is none": Cause(
        "did you mean build?", config=application(import_path="serve_app.app:biuld")
    ),
    "an unknown argument": Cause("did you mean ingresses?", config=with_args(ingreses=2)),
    "an argument of another kind": Cause(
        "ingresses ('two') must be a whole", config=with_args(ingresses="two")
    ),
    "no models": Cause("models", config=with_args(models=[])),
    "an unknown model": Cause("did you mean tiny-wan?", config=with_args(models=["tiny-wam"])),
    "a model without a card": Cause("there is no card 'm'", config=with_args(models=["m"])),
    "a secret in a config": Cause(
        "settings must not hold the secret jwt_secret", config=with_args(settings={"jwt_secret": SECRET})
    ),
    "settings of an application": Cause("lease_s", config=with_args(settings={"lease_s": "long"})),
    "an unknown setting of an application": Cause(
        "did you mean lease_s?", config=with_args(settings={"leese_s": 3})
    ),
    # the cards
    "weights that are not there": Cause(
        "the weights of tiny-flux-schnell are missing",
        config=with_args(models=[CARD["id"]]),
        card=CARD | {"weights": {"path": "models/nowhere"}},
    ),
    "a LoRA that is not there": Cause(
        "the LoRA lost of tiny-flux-schnell is missing",
        config=with_args(models=[CARD["id"]]),
        card=CARD | {"adapters": [{"id": "lost", "path": "models/nowhere.safetensors"}]},
    ),
    "a refiner that is not there": Cause(
        "names the refiner 'nothing'",
        config=with_args(models=[CARD["id"]]),
        card=CARD | {"refiner": "nothing"},
    ),
    "an unknown key of a card": Cause("did you mean guidance?", card=CARD | {"guidence": 3}),
    "a card that is broken": Cause("is not valid YAML", card=b"id: [1"),
    "a card that is empty": Cause("is not a valid model card: id is missing", card=b""),
}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment in which the service could start, with its data in a folder of its own."""
    for name in ("REDIS_URL", "RAY_AUTH_MODE", "S3_BUCKET_NAME", "AWS_ACCESS_KEY_ID", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def written(path: Path, content: dict[str, Any] | bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    return str(path)


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_each_cause_has_one_sentence(
    cause: Cause, clean: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*cause.arguments]
    if cause.config is not None:
        arguments += ["--config", written(clean / "serve.yaml", cause.config)]
    if cause.card is not None:
        monkeypatch.setenv("WEFT_CARDS_DIR", str(clean / "cards"))
        written(clean / "cards" / "card.yaml", cause.card)
    for name, value in cause.environment.items():
        monkeypatch.setenv(name, value)

    status = main(["serve", *arguments])

    out, err = capfd.readouterr()
    assert status == 1
    assert err.startswith("weft: ")
    assert cause.words in err
    assert err.count("\n") == 1, err
    assert SECRET not in out + err
    assert out == ""  # nothing has been started


def test_the_checks_load_neither_ray_nor_torch(clean: Path) -> None:
    code = (
        "import sys\n"
        "from serve_app.cli.main import main\n"
        "status = main(['serve', '--port', '0'])\n"
        "loaded = {'ray', 'torch', 'fastapi', 'fsspec'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else status)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "the port for HTTP is 0" in done.stderr
    assert "loaded" not in done.stderr


@pytest.mark.parametrize(
    "command", [["models"], ["users", "list"], ["keys", "list"], ["doctor"]], ids=" ".join
)
def test_the_other_commands_say_it_in_a_sentence_too(
    command: list[str], clean: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://:{SECRET}@127.0.0.1:1/0")
    monkeypatch.setenv("WEFT_CARDS_DIR", str(clean / "cards"))
    written(clean / "cards" / "card.yaml", CARD | {"guidence": 3})

    status = main(command)

    out, err = capfd.readouterr()
    assert status == 1
    assert "did you mean guidance?" in out + err or "no Redis can be reached at 127.0.0.1:1" in out + err
    assert "Traceback" not in out + err
    assert SECRET not in out + err


def test_an_unexpected_error_is_one_sentence_and_a_traceback_only_on_demand(
    clean: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEFT_API_KEY", SECRET)
    (clean / "data").mkdir()
    (clean / "data" / "valkey").write_text(SECRET)  # where a folder belongs

    quiet = main(["users", "list"])
    short = capfd.readouterr().err
    loud = main(["--debug", "users", "list"])
    long = capfd.readouterr().err

    assert (quiet, loud) == (1, 1)
    assert short.count("\n") == 1
    assert short.startswith("weft: ")
    assert "Traceback" in long


@contextmanager
def listening(answer: bytes | None, *, reuse_port: bool = False) -> Iterator[int]:
    """The port of a server that sends this to every client and closes; None: it never answers."""
    with socket.socket() as server:
        if reuse_port:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(4096)
                    if answer is None:
                        ended.wait(patience())
                    else:
                        client.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join(patience())


STRANGERS = {
    "a web server": ("redis", b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a Redis"),
    "an SSH server": ("redis", b"SSH-2.0-OpenSSH_9\r\n", "is not a Redis"),
    "a port with TLS": ("redis", b"", "write rediss://"),
    "a port without TLS": ("rediss", b"-ERR unknown command\r\n", "without TLS, write redis://"),
    "a server that hangs": ("redis", None, "does not answer within"),
    "a replica": ("redis", b"-READONLY You can't write against a read only replica.\r\n", "name its primary"),
    "a full store": ("redis", b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", "maxmemory"),
    "a full disk": ("redis", b"-MISCONF Errors writing to the AOF file\r\n", "MISCONF"),
    "a store that loads": ("redis", b"-LOADING loading the dataset in memory\r\n", "still loading"),
}


@pytest.mark.parametrize(("scheme", "answer", "words"), STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_usable_redis_is_named(scheme: str, answer: bytes | None, words: str) -> None:
    with listening(answer) as port, pytest.raises(BadRequest) as refused:
        check_redis(f"{scheme}://app:{SECRET}@127.0.0.1:{port}/0", "weft:")

    assert words in refused.value.message
    assert str(port) in refused.value.message
    assert SECRET not in refused.value.message


def test_a_real_store_wants_its_password_and_its_prefix(valkey_url: str) -> None:
    socket_path = valkey_url.partition("@")[2]

    check_redis(valkey_url, "weft:")
    with pytest.raises(BadRequest, match="refuses user or password"):
        check_redis(f"unix://app:{SECRET}@{socket_path}", "weft:")
    with pytest.raises(BadRequest, match="wants a password"):
        check_redis(f"unix://{socket_path}", "weft:")
    with pytest.raises(BadRequest, match=r"does not let this user write our keys.*docs/security\.md"):
        check_redis(valkey_url, "other:")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_another_service_shares_is_taken(host: str) -> None:
    with listening(b"", reuse_port=True) as port:
        with pytest.raises(BadRequest) as refused:
            check_address(host, port, "HTTP", "--port")

        assert f"port {port} on {host} is in use" in refused.value.message
        assert "give another port as --port" in refused.value.message
    check_address(host, port, "HTTP", "--port")  # what is left of its connections is not in the way


def test_weft_serve_does_not_start_on_a_taken_port(clean: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with listening(b"", reuse_port=True) as port:
        status = main(["serve", "--port", str(port)])
        grpc = {"port": port, "grpc_servicer_functions": ["a.b:c"]}
        config = written(clean / "serve.yaml", CONFIG | {"grpc_options": grpc})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            free_port = free.getsockname()[1]
        grpc_status = main(["serve", "--port", str(free_port), "--config", config])

    http, grpc_words = capfd.readouterr().err.splitlines()
    assert (status, grpc_status) == (1, 1)
    assert "so HTTP cannot use it" in http
    assert "so gRPC cannot use it" in grpc_words


@pytest.mark.parametrize("name", ["valkey", "results", "adapter-cache"])
def test_a_file_where_a_folder_of_ours_belongs_is_named(
    name: str, clean: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written(clean / "data" / name, b"")
    (clean / "data" / "lost+found").mkdir(mode=0)  # of the file system

    assert main(["serve"]) == 1
    assert f"{clean / 'data' / name} cannot be a folder" in capfd.readouterr().err


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from serve_app.cli.start_checks import check_folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "check_folder(Path(sys.argv[1]), 'WEFT_DATA_DIR')\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )

    check_folder(tmp_path, "WEFT_DATA_DIR")
    assert f"the disk of {tmp_path} is full; free some space" in done.stderr


@pytest.mark.parametrize("name", ["api_key", "jwt_secret", "ray_token"])
def test_a_generated_secret_that_was_cut_is_not_used(
    name: str, clean: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written(clean / "data" / name, b"")

    assert main(["serve"]) == 1
    assert "delete it, and the next start generates a new one" in capfd.readouterr().err


def test_hosts_are_taken_with_commas_blanks_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(text: str) -> tuple[str, ...]:
        monkeypatch.setenv("WEFT_WEBHOOK_HOSTS", text)
        return Settings.load().webhook_hosts

    assert read("example.org") == ("example.org",)
    assert read("example.org, *.example.com") == ("example.org", "*.example.com")
    assert read('["example.org", "*"]') == ("example.org", "*")
    assert read("") == ()


def test_secrets_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-open")
    monkeypatch.setenv("REDIS_URL", "redis://app:pass%2Fword@host:6379/0")

    masked = without_secrets("redis://app:pass%2Fword@host, pass/word, sesame-open, host")

    assert masked == "redis://app:***@host, ***, ***, host"
