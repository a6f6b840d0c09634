"""The import contracts of pyproject.toml, and rules that they cannot express."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path.relative_to(ROOT) for layer in ("serve_app", "deployments") for path in (ROOT / layer).rglob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def layers() -> set[str]:
    """Every module that a contract of pyproject.toml puts into a layer."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    lines = [line for contract in contracts if contract["type"] == "layers" for line in contract["layers"]]
    return {name.strip(" ()") for line in lines for name in line.replace(":", "|").split("|")}


def test_the_import_contracts_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_is_in_a_layer(path: Path) -> None:
    parts = module_name(path).split(".")
    parents = {".".join(parts[: length + 1]) for length in range(len(parts))}

    is_package = any(layer.startswith(".".join(parts) + ".") for layer in layers())  # with layers inside it
    is_root = len(parts) == 1
    assert parents & layers() or is_package or is_root, "add it to a layer in pyproject.toml"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_are_absolute(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))

    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def test_building_the_graph_loads_no_torch() -> None:
    code = (
        "import sys, serve_app.app; heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules); "
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_no_code_evaluates_or_loads_what_can_run_code() -> None:
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

    for path in MODULES:
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


def test_what_ray_has_for_unpickling_is_only_used_to_register_a_module() -> None:
    # the import contract sees only the top of a foreign package: `ray`, not `ray.cloudpickle`
    unpicklers = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    uses = set()

    for path in MODULES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            match node:
                case ast.Import() | ast.ImportFrom():
                    names = {part for alias in node.names for part in alias.name.split(".")}
                    if isinstance(node, ast.ImportFrom) and node.module is not None:
                        names.update(node.module.split("."))
                case ast.Attribute(ast.Name(name) | ast.Attribute(attr=name)):
                    names = {name}
                case _:
                    continue
            if names & unpicklers:
                uses.add((str(path), ast.unparse(node)))

    scaler = "serve_app/ray_serve/autoscaling.py"
    assert uses == {
        (scaler, "from ray import cloudpickle"),
        (scaler, "cloudpickle.register_pickle_by_value"),
    }
