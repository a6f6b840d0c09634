"""The systemd units of a node: what is installed, what it runs, and that systemd takes it."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STORES = """
REDIS_URL=rediss://app:secret@jobs:6379
RAY_REDIS_ADDRESS=state:6379
RAY_REDIS_USERNAME=ray
RAY_REDIS_PASSWORD='a $ecret'
"""
SUDO = """#!/bin/sh
case $1 in
  tee) [ "$2" != -a ] || shift; cat > "$INSTALLED/$(basename "$2")" ;;
  mkdir | cp) ;;
  *) echo "$@" >> "$INSTALLED/calls" ;;
esac
"""
RAY = """#!/bin/sh
for argument in "$@"; do echo "$argument"; done
env | sed -n '/^RAY_/p'
"""
OF_RAY_UP = {  # what `ray up` exports before the start commands
    "RAY_CLOUD_INSTANCE_ID": "i-0123",
    "RAY_NODE_TYPE_NAME": "head",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_OVERRIDE_RESOURCES": '{"CPU":8,"front":100,"it\'s":1}',
    "RAY_HEAD_IP": "10.0.0.7",
}


class Node:
    """A node after `ray up` has copied its files, with programs that write down how they were called."""

    def __init__(self, home: Path, environment: str) -> None:
        self.home, self.installed = home, home / "installed"
        shutil.copytree(ROOT / "configs/clusters", home / "weft/configs/clusters")
        (home / "weft/.env").write_text(environment)
        (home / "ray_bootstrap_config.yaml").write_text('{"cluster_name": "weft-b"}')
        self.installed.mkdir()
        programs = home / "weft/.venv/bin"
        programs.mkdir(parents=True)
        for name, text in (("sudo", SUDO), ("ray", RAY), ("serve", RAY), ("apt-get", SUDO)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "INSTALLED": str(self.installed),
        }

    def run(
        self, script: str, *arguments: str, extra: Mapping[str, str] = OF_RAY_UP
    ) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(self.home / "weft/configs/clusters" / script), *arguments]
        environment = self._environment | dict(extra)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        return (self.installed / "calls").read_text().splitlines()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path, STORES)


def test_units_of_a_head_start_ray_and_deploy_now_and_at_each_boot(node: Node) -> None:
    done = node.run("units.sh", "head")

    assert done.returncode == 0, done.stderr
    assert node.calls() == [
        "systemctl daemon-reload",
        "systemctl enable --quiet weft-ray@head.service weft-deploy.service",
        "systemctl restart --no-block weft-ray@head.service weft-deploy.service",
    ]


def test_units_of_a_worker_start_ray_alone(node: Node) -> None:
    node.run("units.sh", "worker")

    assert "systemctl enable --quiet weft-ray@worker.service" in node.calls()


def test_units_name_the_folder_and_the_user_of_the_node(node: Node) -> None:
    node.run("units.sh", "head")
    units = {file.name: file.read_text() for file in node.installed.glob("*.service")}

    assert sorted(units) == ["weft-deploy.service", "weft-ray@.service"]
    for text in units.values():
        assert f"\nUser={getpass.getuser()}\n" in text
        assert f"\nExecStart={node.home}/weft/configs/clusters/" in text
    assert "PartOf=weft-ray@head.service" in units["weft-deploy.service"], "else a crash would undo it"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_units(node: Node) -> None:
    node.run("units.sh", "head")
    files = []
    for name, target in (("weft-ray@.service", "weft-ray@head.service"), ("weft-deploy.service", "")):
        files.append(str((node.installed / name).rename(node.installed / (target or name))))

    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)

    said = [line for line in done.stderr.splitlines() if str(node.installed) in line or "weft" in line]
    assert (done.returncode, said) == (0, [])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_would_find_a_misspelt_line(node: Node) -> None:
    node.run("units.sh", "head")
    unit = node.installed / "weft-deploy.service"
    unit.write_text(unit.read_text().replace("RemainAfterExit", "RemainsAfterExit"))

    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )

    assert "RemainsAfterExit" in done.stderr


def test_a_start_by_systemd_knows_what_ray_up_said_about_the_node(node: Node) -> None:
    node.run("units.sh", "head")
    node.run("units.sh", "head", extra={})  # by hand

    done = node.run("node.sh", "head", extra={})  # systemd has none of these variables

    said = set(done.stdout.splitlines())
    assert said > {f"{name}={value}" for name, value in OF_RAY_UP.items()}, done.stderr
    assert (node.home / "weft/ray.env").stat().st_mode & 0o077 == 0


def test_the_head_keeps_its_state_under_the_name_of_the_cluster_and_its_dashboard_to_itself(
    node: Node,
) -> None:
    said = node.run("node.sh", "head").stdout.splitlines()

    assert said[:3] == ["start", "--head", "--block"]
    assert {"--dashboard-host=127.0.0.1", "--num-gpus=0"} < set(said)
    assert f"--autoscaling-config={node.home}/ray_bootstrap_config.yaml" in said
    assert {"--redis-username=ray", "--redis-password=a $ecret", "RAY_REDIS_ADDRESS=state:6379"} < set(said)
    assert "RAY_external_storage_namespace=weft-b" in said


def test_a_worker_joins_the_head_and_knows_nothing_of_its_store(node: Node) -> None:
    said = node.run("node.sh", "worker").stdout.splitlines()

    assert said[:3] == ["start", "--block", "--address=10.0.0.7:6379"]
    assert [line for line in said if "REDIS" in line] == []
    assert "RAY_AUTH_MODE=token" in said


def test_a_mistake_in_the_environment_file_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    node = Node(tmp_path, "REDIS_URL=")

    done = node.run("units.sh", "head")

    assert done.returncode == 2
    assert "REDIS_URL is missing" in done.stderr
    assert list(node.installed.iterdir()) == []


@pytest.mark.parametrize("script", ["units.sh", "node.sh"])
def test_another_kind_of_node_is_refused(node: Node, script: str) -> None:
    done = node.run(script, "haed")

    assert done.returncode == 2
    assert "haed is neither head nor worker" in done.stderr


PUBLIC = f"{STORES}\nWEFT_PUBLIC_URL=https://weft.example.org\nWEFT_API_KEY=k\n"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (STORES, "WEFT_PUBLIC_URL of .env must be https://"),
        (PUBLIC.replace("https:", "http:"), "WEFT_PUBLIC_URL of .env must be https://"),
        (PUBLIC.replace("WEFT_API_KEY=k", ""), "WEFT_API_KEY is not in .env"),
        (PUBLIC, "WEFT_TRUSTED_PROXIES of .env must have 127.0.0.1"),
        (f"{PUBLIC}WEFT_TRUSTED_PROXIES=10.127.0.0.1", "WEFT_TRUSTED_PROXIES of .env must have 127.0.0.1"),
    ],
)
def test_https_is_refused_where_weft_could_not_know_its_callers(
    tmp_path: Path, environment: str, said: str
) -> None:
    done = Node(tmp_path, environment).run("tls.sh")

    assert done.returncode == 2
    assert said in done.stderr


def test_https_starts_caddy_with_the_address_of_the_installation(tmp_path: Path) -> None:
    node = Node(tmp_path, f'{PUBLIC}WEFT_TRUSTED_PROXIES="10.0.0.0/8, 127.0.0.1"')

    done = node.run("tls.sh")

    assert done.returncode == 0, done.stderr
    assert node.calls()[-1] == "systemctl restart caddy"
    assert (
        "Environment=WEFT_PUBLIC_URL=https://weft.example.org" in (node.installed / "weft.conf").read_text()
    )


def test_an_image_is_never_made_of_a_node_with_secrets(node: Node) -> None:
    done = node.run("bake.sh", "s3", "boto3")

    assert done.returncode == 2
    assert ".env is here: this is a node" in done.stderr
    assert list(node.installed.iterdir()) == []
