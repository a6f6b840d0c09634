"""Who may import whom, and which foreign library lives where: docs/structure.md as a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path.relative_to(ROOT) for floor in ("serve_app", "deployments") for path in (ROOT / floor).rglob("*.py")
)

# A room may import from rooms after it in its list. Rooms in one tuple are strangers to each other.
FRONT = (
    ("serve_app.cli.main",),
    ("serve_app.app", "serve_app.ray_serve.local_cluster", "serve_app.cli.users", "serve_app.cli.doctor"),
    ("serve_app.ray_serve.ingress", "serve_app.ray_serve.dispatcher", "serve_app.ray_serve.lora_files"),
    ("serve_app.api",),
    (
        "serve_app.ray_serve.shutdown_hook",
        "serve_app.services",
        "serve_app.ray_serve.model_client",
        "serve_app.redis.embedded",
        "serve_app.redis.info",
    ),
    ("serve_app.jobs", "serve_app.loras"),
    ("serve_app.admission", "serve_app.storage", "serve_app.ray_serve.routing"),
    (
        "serve_app.settings",
        "serve_app.job_ids",
        "serve_app.redis.transactions",
        "serve_app.ray_serve.args",
        "serve_app.ray_serve.autoscaling",
        "serve_app.observability.metrics",
        "serve_app.observability.tracing",
    ),
    ("deployments.validation",),
    ("deployments.sandbox", "deployments.lora_format"),
    ("deployments.protocol",),
)
WORKSHOP = (
    ("deployments.lora", "deployments.video"),
    ("deployments.replica", "deployments.executors.video_encoding", "deployments.executors.frame_scheduler"),
    ("deployments.observability.collectors", "deployments.weights_prefetcher"),
    ("deployments.models.model_instance", "deployments.encoder"),
    ("deployments.models", "deployments.pipelines", "deployments.observability.metrics"),
    ("deployments.loras", "deployments.media"),
    ("deployments.engine",),
    ("deployments.validation",),
    ("deployments.sandbox", "deployments.lora_format"),
    ("deployments.protocol",),
)
ALSO = {  # the roof binds both floors
    "serve_app.app": {
        "deployments.replica",
        "deployments.lora",
        "deployments.video",
        "deployments.encoder",
        "deployments.weights_prefetcher",
    }
}
BARE = {
    "serve_app",
    "deployments.observability",
    "serve_app.cli",
    "serve_app.ray_serve",
    "serve_app.observability",
    "deployments",
    "deployments.__version__",
}  # `from serve_app import local` names both
# library -> the rooms that may import it
HOMES = {
    "fastapi": ("serve_app.api", "serve_app.ray_serve.ingress"),
    "starlette": ("serve_app.api",),
    "redis": (
        "serve_app.redis.transactions",
        "serve_app.admission",
        "serve_app.jobs",
        "serve_app.loras",
        "serve_app.redis.embedded",
        "serve_app.redis.info",
    ),
    "jwt": ("serve_app.admission",),
    "fastapi_offline": ("serve_app.api",),
    "fsspec": ("serve_app.storage", "deployments.models.weight_cache"),
    "httpcore": ("serve_app.storage.url_fetcher",),
    "httpx": ("serve_app.storage.url_fetcher",),
    "prometheus_client": ("serve_app.api.metrics", "serve_app.observability.metrics"),
    "opentelemetry": ("serve_app.observability.tracing",),
    "ray": (
        "serve_app.app",
        "serve_app.ray_serve.autoscaling",
        "serve_app.ray_serve.ingress",
        "serve_app.ray_serve.dispatcher",
        "serve_app.ray_serve.lora_files",
        "serve_app.ray_serve.model_client",
        "serve_app.ray_serve.local_cluster",
        "serve_app.ray_serve.shutdown_hook",
        "serve_app.observability.metrics",
        "deployments.observability.metrics",
        "deployments.weights_prefetcher",
        "deployments.lora",
        "deployments.video",
        "deployments.executors.video_encoding",
    ),
    "torch": (
        "deployments.engine",
        "deployments.loras",
        "deployments.pipelines",
        "deployments.models",
        "deployments.models.model_instance",
        "deployments.observability.collectors",
        "deployments.replica",
        "deployments.video",
    ),
    "greenlet": ("deployments.engine",),
    "huggingface_hub": ("deployments.models.weight_cache",),
    "diffusers": ("deployments.loras", "deployments.pipelines", "deployments.models"),
    "transformers": ("deployments.pipelines", "deployments.models"),
    "safetensors": ("deployments.loras", "deployments.pipelines"),
    "cv2": ("deployments.media",),
    "av": ("deployments.media.movie",),
    "pickle": (),
    "cloudpickle": (),
}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of everything the file imports, at any depth of its code."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> tuple[int, str] | None:
    floors = FRONT if name.startswith("serve_app") else WORKSHOP
    for level, rooms in enumerate(floors):
        for room in rooms:
            if within(name, room):
                return level, room
    return None


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down_only(path: Path) -> None:
    name = module_name(path)
    place = room_of(name)
    if place is None:
        packages = ("cli", "ray_serve", "redis", "observability")
        bare = {"serve_app", "deployments", "deployments.executors", "deployments.observability"}
        bare |= {f"serve_app.{package}" for package in packages}
        assert name in bare, f"{name} has no room; add it to the plan and here"
        return
    level, room = place
    floors = FRONT if name.startswith("serve_app") else WORKSHOP
    allowed = {room, *(r for rooms in floors[level + 1 :] for r in rooms)}
    allowed |= ALSO.get(room, set())

    for wanted in imports(path):
        if wanted.split(".")[0] in ("serve_app", "deployments") and wanted not in BARE:
            assert any(within(wanted, a) for a in allowed), f"{name} may not import {wanted}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_each_foreign_library_stays_in_its_home(path: Path) -> None:
    name = module_name(path)

    for wanted in imports(path):
        for library, homes in HOMES.items():
            if within(wanted, library):
                assert any(within(name, home) for home in homes), f"{library} has no business in {name}"


def test_building_the_graph_loads_no_torch() -> None:
    code = (
        "import sys, serve_app.app; heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules); "
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_no_code_of_ours_unpickles_or_evaluates() -> None:
    forbidden = {"eval", "exec", "compile", "__import__"}
    # yaml.load and np.load run what a file says; torch.load does so again and again, weights_only or not
    methods = {
        ("torch", "load"),
        ("yaml", "load"),
        ("yaml", "unsafe_load"),
        ("yaml", "full_load"),
        ("np", "load"),
        ("numpy", "load"),
        ("joblib", "load"),
    }
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}

    for path in MODULES:
        assert not modules & {name.split(".")[0] for name in imports(path)}, f"{path} can unpickle"
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            match node.func:
                case ast.Name(name):
                    assert name not in forbidden, f"{path}:{node.lineno} calls {name}"
                case ast.Attribute(ast.Name(module), name):
                    assert (module, name) not in methods, f"{path}:{node.lineno} calls {module}.{name}"
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            for danger in ("trust_remote_code", "allow_pickle"):
                assert danger not in given, f"{path}:{node.lineno} sets {danger}"
