"""The image's recipe and what GitHub does with it. There is no Docker in the tests: CI builds and runs it."""

from __future__ import annotations

import fnmatch
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tools import link_environment

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, value) in order."""
    text = (ROOT / "Dockerfile").read_bytes()
    parser = DockerfileParser(fileobj=io.BytesIO(text))
    return [(one["instruction"], one["value"]) for one in parser.structure if one["instruction"] != "COMMENT"]


def last_stage(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    begin = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[begin:]


def test_the_image_is_built_in_stages_from_a_pinned_python(instructions: list[tuple[str, str]]) -> None:
    stages = [value.split() for name, value in instructions if name == "FROM"]
    names = {stage[2] for stage in stages}
    arguments = dict(value.split("=", 1) for name, value in instructions if name == "ARG" and "=" in value)

    foreign = [stage[0] for stage in stages if stage[0] not in names and "${DEVICE}" not in stage[0]]

    assert foreign == ["python:${PYTHON}-slim-trixie"]
    assert arguments["PYTHON"].count(".") == 2
    assert {f"{kind}-{device}" for kind in ("wheels", "device") for device in ("cpu", "cuda")} <= names
    assert arguments["DEVICE"] == "cpu"


def test_it_runs_as_an_ordinary_user_and_reports_its_health(instructions: list[tuple[str, str]]) -> None:
    last = dict(last_stage(instructions))

    uid, _, gid = last["USER"].partition(":")

    assert int(uid) > 0
    assert int(gid) > 0
    assert "/health" in last["HEALTHCHECK"]
    assert last["CMD"].startswith('["weft", "serve"')


def test_byte_code_is_written_while_root_builds_the_image(instructions: list[tuple[str, str]]) -> None:
    names = [(name, value) for name, value in last_stage(instructions)]

    compiled = names.index(("RUN", "python -m tools.bytecode"))

    assert compiled > max(index for index, (name, _) in enumerate(names) if name == "COPY")
    assert compiled < next(index for index, (name, _) in enumerate(names) if name == "USER")


def test_every_file_it_copies_is_there_and_passes_the_ignore_file(
    instructions: list[tuple[str, str]],
) -> None:
    copied = [
        source
        for name, value in instructions
        if name == "COPY" and not value.startswith("--from")
        for source in value.split()[:-1]
    ]
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]

    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert [source for source in copied if not any(Path(source).is_relative_to(a) for a in allowed)] == []
    assert {"**/secrets", "**/.env"} <= set(rules)
    assert not any(fnmatch.fnmatch("data/valkey", rule) for rule in allowed)


def test_layers_go_from_large_and_rarely_changed_to_small_and_often_changed(
    instructions: list[tuple[str, str]],
) -> None:
    copies = [value for name, value in last_stage(instructions) if name == "COPY"]
    packages, files = copies[:2], copies[2:]

    assert packages == ["--from=torch /opt/torch /opt/torch", "--from=dependencies /opt/venv /opt/venv"]
    assert not any(value.startswith("--from") for value in files)
    order = [value.split()[0] for value in files]
    assert order.index("models") < order.index("serve_app") < order.index("deployments")
    # nothing of ours is in the layer of torch, which would be another with each of our versions
    assert [value for name, value in stage_called(instructions, "torch") if name == "COPY"] == [
        "constraints.txt ./"
    ]


def test_the_head_of_the_file_names_the_torch_that_it_installs(instructions: list[tuple[str, str]]) -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch==(\d+\.\d+)\.", constraints, re.MULTILINE)
    head = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("\nARG")[0]

    assert f"torch {version} brings the libraries of CUDA" in head
    assert re.search(r"a driver of \d{3} or newer", head)


def test_all_that_it_writes_is_on_volumes_or_in_tmp(instructions: list[tuple[str, str]]) -> None:
    last = last_stage(instructions)
    (volumes,) = [json.loads(value) for name, value in last if name == "VOLUME"]
    variables = dict(re.findall(r"(\w+)=(\S+)", next(value for name, value in last if name == "ENV")))

    written = {name: variables[name] for name in ("HOME", "WEFT_DATA_DIR", "HF_HOME", "WEFT_MODEL_CACHE")}
    assert [place for place in written.values() if not place.startswith((*volumes, "/tmp"))] == []


def test_an_environment_finds_the_packages_of_the_one_it_is_linked_to(tmp_path: Path) -> None:
    for name in ("venv", "torch"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", name], cwd=tmp_path, check=True)
    (packages,) = (tmp_path / "torch/lib").glob("python*/site-packages")
    (packages / "torch.py").write_text("NAME = 'the linked one'")
    (packages / "torch-2.0.dist-info").mkdir()
    (packages / "torch-2.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.0\n"
    )

    link_environment.link(tmp_path / "venv", tmp_path / "torch")
    code = "import torch; from importlib.metadata import version; print(torch.NAME, version('torch'))"
    said = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", code],
        env={},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert said.stdout.strip() == "the linked one 2.0"
    with pytest.raises(FileNotFoundError, match="no virtual environment"):
        link_environment.link(tmp_path / "none", tmp_path / "torch")


def test_every_package_has_the_version_of_the_constraints(instructions: list[tuple[str, str]]) -> None:
    installs = [
        part
        for name, value in instructions
        if name == "RUN"
        for part in value.split("&&")
        if "pip install" in part
    ]

    assert len(installs) == 3
    assert all("--constraint constraints.txt" in install for install in installs)


def stage_called(instructions: list[tuple[str, str]], wanted: str) -> list[tuple[str, str]]:
    """What follows `FROM ... AS wanted`, to the next stage."""
    begin = next(i for i, (name, value) in enumerate(instructions) if value.endswith(f"AS {wanted}"))
    rest = instructions[begin + 1 :]
    end = next((i for i, (name, _) in enumerate(rest) if name == "FROM"), len(rest))
    return rest[:end]


def test_on_gpus_it_has_what_triton_and_torchs_compiler_call(instructions: list[tuple[str, str]]) -> None:
    (run,) = [value for name, value in stage_called(instructions, "device-cuda") if name == "RUN"]
    update, install, clean = run.split("&&")

    assert update.split() == ["apt-get", "update"]
    assert install.split()[:4] == ["apt-get", "install", "--yes", "--no-install-recommends"]
    assert set(install.split()[4:]) == {"gcc", "g++", "libc6-dev"}
    assert clean.split() == ["rm", "-rf", "/var/lib/apt/lists/*"], "in the same layer, which would keep them"
    assert stage_called(instructions, "device-cpu") == []
    assert last_stage(instructions)[0] == ("FROM", "device-${DEVICE} AS weft")


@pytest.mark.parametrize(
    ("index", "given"), [("", []), ("https://a.example/b", ["--index-url", "https://a.example/b"])]
)
def test_packages_come_from_pips_own_index_and_torch_from_a_given_one(
    index: str, given: list[str], instructions: list[tuple[str, str]]
) -> None:
    runs = [value for name, value in instructions if name == "RUN" and "pip install" in value]
    script = f'pip() {{ printf "%s\\n" "$*"; }}; {"; ".join(runs)}'

    called = subprocess.run(
        ["sh", "-euc", script], env={"TORCH_INDEX": index}, capture_output=True, text=True, check=True
    )
    torch, *others = called.stdout.splitlines()

    assert torch.split() == ["install", "--constraint", "constraints.txt", "--no-deps", *given, "torch"]
    assert len(others) == 2
    assert not any("index" in other for other in others)
    assert "pypi.org" not in (ROOT / "Dockerfile").read_text()
    assert ("ARG", "TORCH_INDEX") in stage_called(instructions, "wheels-cuda")


def test_the_last_stage_brings_neither_compilers_nor_pip_runs(instructions: list[tuple[str, str]]) -> None:
    commands = " ".join(value for name, value in last_stage(instructions) if name == "RUN")

    assert "pip" not in commands
    assert "apt-get" not in commands


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_fit_githubs_schema(workflow: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]

    checked = subprocess.run([*command, str(workflow)], capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stdout


def test_the_pipeline_checks_and_builds_what_we_ship() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = " ".join(step.get("run", "") for step in jobs["check"]["steps"])
    makefile = (ROOT / "Makefile").read_text()

    assert jobs["image"]["strategy"]["matrix"]["device"] == ["cpu", "cuda"]
    assert {"lint", "types", "test"} <= set(runs.replace("make", "").split())
    assert all(f"\n{target}:" in makefile for target in ("lint", "types", "test", "audit"))
