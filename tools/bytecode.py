"""Writes the byte code of what Weft's processes import: `python -m tools.bytecode`, at the end of an install.

Where PYTHONDONTWRITEBYTECODE is set, or another user runs the service, Python compiles torch, diffusers and
ray again in every process: 3 times the CPU time of an import.  Only what is imported is compiled, a third of
the work of compiling the whole environment.  Two processes do so at once.
"""

from __future__ import annotations

import compileall
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("deployments", "serve_app", "tools")
MODULES = {  # of each kind of process
    "inference": (
        *("deployments.replica", "deployments.runtime", "deployments.encoder"),
        *("deployments.weights_prefetcher", "peft", "accelerate", "torch._dynamo"),
    ),
    "serving": (
        *("serve_app.app", "serve_app.cli.main", "serve_app.ray_serve.ingress"),
        *("serve_app.ray_serve.dispatcher", "serve_app.ray_serve.local_cluster"),
        *("ray.serve._private.controller", "ray.serve._private.proxy", "ray.serve._private.replica"),
    ),
    "tests": ("pytest", "hypothesis", "openai", "schemathesis", "moto.server", "playwright.sync_api", "s3fs"),
}
RAY_FOLDERS = ("_private", "autoscaler", "dashboard", "serve", "util")  # of Ray's own processes


def main() -> None:
    """Import each group in a process of its own; exit with the first status that is not 0."""
    if len(sys.argv) > 1:
        import_group(sys.argv[1])
        return
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tools.bytecode"]
    groups = {
        group: subprocess.Popen([*command, group], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for group in ("inference", "serving")
    }
    for folder in OURS:
        compileall.compile_dir(ROOT / folder, quiet=1)
    for group, process in groups.items():
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"the {group} modules cannot be imported:\n{errors.decode()[-2000:]}")


def import_group(group: str) -> None:
    """Import the modules of a kind of process; Python writes their byte code."""
    for name in MODULES[group]:
        importlib.import_module(name)
    if group == "inference":
        _import_model_classes()
        return
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    for folder in RAY_FOLDERS:
        compileall.compile_dir(Path(ray.origin).with_name(folder), quiet=1)
    for name in MODULES["tests"]:
        if find_spec(name.partition(".")[0]):
            importlib.import_module(name)


def _import_model_classes() -> None:
    """The classes of the models that ship: diffusers and transformers import them when they are used."""
    for index in (ROOT / "models").glob("*/model_index.json"):
        parts = json.loads(index.read_text(encoding="utf-8"))
        classes = [
            ["diffusers", parts["_class_name"]],
            *(part for part in parts.values() if isinstance(part, list)),
        ]
        for library, name in classes:
            if library:
                getattr(importlib.import_module(library), name)


if __name__ == "__main__":
    main()
