"""configs/clusters/environment.sh: what Ray's processes get of `.env`, and what boto3 makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STORE = "REDIS_URL=rediss://app:secret@store:6379"
KEYS = "AWS_ACCESS_KEY_ID=of-the-bucket\nAWS_SECRET_ACCESS_KEY='a $ecret'"
SYSTEM = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": "/nonexistent"}
ASK_BOTO3 = """
import boto3
session = boto3.Session(region_name="us-west-2")
print(session.get_credentials().access_key, session.client("ec2").meta.endpoint_url)
"""
ASK_SETTINGS = """
from serve_app.settings import Settings
settings = Settings.load()
key, secret = settings.aws_access_key_id, settings.aws_secret_access_key
print(key and key.get_secret_value(), secret and secret.get_secret_value(), settings.s3_endpoint_url)
"""


class RoleOfTheInstance(BaseHTTPRequestHandler):
    """The metadata service of an EC2 instance, as far as boto3 asks it for the role's keys."""

    def do_PUT(self) -> None:
        self._say("token")

    def do_GET(self) -> None:
        role = {"Code": "Success", "AccessKeyId": "of-the-role", "SecretAccessKey": "x", "Token": "t"}
        role |= {
            "Expiration": "2099-01-01T00:00:00Z",
            "Type": "AWS-HMAC",
            "LastUpdated": "2020-01-01T00:00:00Z",
        }
        self._say("head-role" if self.path.endswith("/") else json.dumps(role))

    def _say(self, text: str) -> None:
        self.send_response(200)
        self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "60")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def role() -> Iterator[dict[str, str]]:
    """Variables with which boto3 finds the role."""
    with HTTPServer(("127.0.0.1", 0), RoleOfTheInstance) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{server.server_port}/"}
        server.shutdown()


class Node:
    """A node's folder with this `.env`."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self._folder = folder
        (folder / "configs/clusters").mkdir(parents=True)
        script = folder / "configs/clusters/environment.sh"
        script.write_text((ROOT / "configs/clusters/environment.sh").read_text())
        (folder / ".env").write_text("\n".join(lines))
        self._command = ["sh", str(script)]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *command],
            env=SYSTEM | {"PYTHONPATH": str(ROOT)} | environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def environment(self) -> dict[str, str]:
        done = self.run("env")
        assert not done.returncode, done.stderr
        return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_rays_autoscaler_uses_the_role_of_the_head_and_weft_the_keys_of_the_bucket(
    tmp_path: Path, role: dict[str, str]
) -> None:
    node = Node(tmp_path, STORE, KEYS, "AWS_ENDPOINT_URL=https://storage.example", "AWS_REGION=auto")

    autoscaler = node.run(sys.executable, "-c", ASK_BOTO3, **role)
    weft = node.run(sys.executable, "-c", ASK_SETTINGS)

    assert autoscaler.stdout == "of-the-role https://ec2.us-west-2.amazonaws.com\n", autoscaler.stderr
    assert weft.stdout == "of-the-bucket a $ecret https://storage.example\n", weft.stderr


def test_boto3_takes_such_keys_before_the_role(role: dict[str, str]) -> None:
    """Else the script would not be needed."""
    keys = {"AWS_ACCESS_KEY_ID": "of-the-bucket", "AWS_SECRET_ACCESS_KEY": "x"}

    done = subprocess.run(
        [sys.executable, "-c", ASK_BOTO3],
        env=SYSTEM | role | keys,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.startswith("of-the-bucket")


def test_names_of_ours_go_before_those_of_aws(tmp_path: Path) -> None:
    node = Node(tmp_path, STORE, KEYS, "WEFT_AWS_ACCESS_KEY_ID=ours", "WEFT_AWS_SECRET_ACCESS_KEY=our-secret")

    found = node.environment()

    assert (found["WEFT_AWS_ACCESS_KEY_ID"], found["WEFT_AWS_SECRET_ACCESS_KEY"]) == ("ours", "our-secret")
    assert [name for name in found if name.startswith("AWS_")] == []


def test_every_process_has_a_token_a_store_and_folders_that_outlive_the_node(tmp_path: Path) -> None:
    found = Node(tmp_path, STORE).environment()

    assert found["RAY_AUTH_MODE"] == "token"
    assert f"REDIS_URL={found['REDIS_URL']}" == STORE
    assert (found["HF_HOME"], found["WEFT_MODEL_CACHE"]) == ("/mnt/models/huggingface", "/mnt/models/weft")
    assert found["PATH"].startswith(f"{tmp_path}/.venv/bin:")


def test_folders_of_the_operator_stay(tmp_path: Path) -> None:
    found = Node(tmp_path, STORE, "HF_HOME=/data/hub", "WEFT_MODEL_CACHE=/data/weft").environment()

    assert (found["HF_HOME"], found["WEFT_MODEL_CACHE"]) == ("/data/hub", "/data/weft")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "REDIS_URL is missing"),
        (["REDIS_URL="], "REDIS_URL is missing"),
        ([STORE, KEYS, "AWS_SESSION_TOKEN=t"], "AWS_SESSION_TOKEN: keys that end within hours"),
        ([STORE, "AWS_PROFILE=mine"], "AWS_PROFILE: Ray would use it in place of the node's role"),
        ([STORE, "AWS_CONFIG_FILE=/home/me/.aws/config"], "AWS_CONFIG_FILE: Ray would use it"),
    ],
)
def test_what_cannot_work_stops_the_start_in_one_line(tmp_path: Path, lines: list[str], said: str) -> None:
    done = Node(tmp_path, *lines).run("echo", "started")

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_node_without_the_file_says_so(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (tmp_path / ".env").unlink()

    done = node.run("echo", "started")

    assert (done.returncode, done.stdout) == (2, "")
    assert ".env: cannot be read" in done.stderr
