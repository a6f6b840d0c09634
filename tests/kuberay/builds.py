"""The manifests of configs/kuberay and configs/kubernetes as kustomize builds them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def folder_of_manifests(made: Path) -> Path:
    """configs/kubernetes below this folder, beside configs/kuberay with the secrets of an installation."""
    for name in ("kuberay", "kubernetes"):
        shutil.copytree(CONFIGS / name, made / name, ignore=shutil.ignore_patterns("secrets"))
    subprocess.run(["sh", str(made / "kuberay/secrets.sh")], check=True, capture_output=True)
    return made / "kubernetes"


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", "kustomize", str(folder)], check=False, capture_output=True, text=True)


def built(folder: Path) -> list[dict[str, Any]]:
    run = kustomize(folder)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in manifests if one["kind"] == kind]


def built_with(folder: Path, platform: str, *components: str) -> list[dict[str, Any]]:
    """The manifests of this platform with these components added."""
    own = folder / "-".join(("own", platform, *components))
    own.mkdir()
    listed = ", ".join(f"../{name}" for name in components)
    (own / "kustomization.yaml").write_text(f"resources: [../{platform}]\ncomponents: [{listed}]\n")
    return built(own)
