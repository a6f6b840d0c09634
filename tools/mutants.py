"""Mutation tests: does a test fail when one expression of the engine or of the job store changes?

    python -m tools.mutants                                      all modules: some hours of one core
    python -m tools.mutants deployments/engine/batch_key.py      some modules or folders
    python -m tools.mutants --record ...                         also writes down survivors that are new

mutmut changes one expression at a time and runs the tests that reach it.  A change that no test notices
survives.  The known survivors are listed in tests/mutants.txt; another one fails this command, and one that
is gone leaves the list: it only shrinks.  An interrupted run continues where it stopped, as long as the
tests do not change; the modules that it has finished are compared or recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutants"
LIST = ROOT / "tests" / "mutants.txt"
HEADING = (
    "# Mutants that survive the tests, written by `make mutants`: module, function, then what was changed.\n"
)
DETECTED = {
    1,
    3,
    24,
    36,
    37,
    152,
    255,
    -24,
    -11,
    -9,
}  # exit codes of mutmut: a test failed, timed out or crashed


@dataclass(frozen=True)
class Group:
    """Modules of one folder, and the tests that have to notice a change of them."""

    name: str
    folder: str
    tests: tuple[str, ...]
    modules: frozenset[str] = frozenset()  # without `.py`; empty: all that no other group of the folder names
    left_out: tuple[str, ...] = ()  # tests that take seconds: each mutant that survives would run them
    test_limit_s: int = 60  # a mutant may hang


def _tests(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/test_{name}.py" for name in names.split())


GROUPS = (
    Group(  # decisions: their tests take seconds
        "engine-rules",
        "deployments/engine",
        _tests("tests/inference/engine", "batch_buckets batch_key call policy stacking step_scheduler"),
        frozenset(
            """argument_roles batch_buckets batch_filling batch_key bit_trials call call_signature cost_model
            engine_stats fair_share lora_rows policy scheduled_job simulate stacking step_costs
            step_scheduler""".split()
        ),
    ),
    Group(
        "engine",
        "deployments/engine",
        _tests("tests/inference/engine", "auxiliary_lane engine work_reported worker"),
    ),
    Group(  # decisions: their tests need no store
        "jobs-rules",
        "serve_app/jobs",
        _tests(
            "tests/serving/jobs",
            "cache_keys events fair_queue job lease_keeper signed_links start_estimate transitions",
        ),
        frozenset(
            """cache_keys endings events fair_queue indexes job lease_keeper signed_links start_estimate
            transitions""".split()
        ),
    ),
    Group(
        "jobs",
        "serve_app/jobs",
        ("tests/serving/jobs", "tests/serving/admission/test_quota.py"),
        left_out=(
            "tests/serving/jobs/test_job_store_properties.py",
            "tests/serving/jobs/test_process_deaths.py",
            "tests/serving/jobs/test_dispatch.py::test_slow_storage_costs_no_lease",
            "tests/serving/jobs/test_dispatch.py::test_a_silent_model_keeps_its_lease",
        ),
        test_limit_s=20,
    ),
)
PYTEST = ("-p", "no:cacheprovider", "-p", "no:xdist", "--session-timeout=86400")


def main() -> None:
    """Run mutmut for the named modules and compare the survivors with the list; exit status 1 on new ones."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__, formatter_class=raw)
    parser.add_argument("modules", nargs="*", help="files or folders (default: the engine and the jobs)")
    parser.add_argument("--record", action="store_true", help="add new survivors to the list")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    known = read_list()
    failed = False
    for group in GROUPS:
        modules = selected(group, options.modules)
        if not modules:
            continue
        found = survivors(group, modules, options.processes)
        for module, mutants in found.items():
            if mutants is None:
                print(f"{module}: not finished; run this command again")
                failed = True
                continue
            if module not in known and not options.record:
                print(f"{module}: {mutants.total()} survive; it is not in the list yet, see --record")
                failed = True
                continue
            new = mutants - known.get(module, Counter())
            print(f"{module}: {mutants.total()} survive, {new.total()} of them new")
            if new and not options.record:
                failed = True
                print("\n".join(f"  new: {mutant}" for mutant in sorted(new.elements())))
            known[module] = mutants if options.record else mutants & known[module]
        if None in found.values():
            break
    write_list(known)
    sys.exit(failed)


def selected(group: Group, wanted: list[str]) -> list[str]:
    """The group's modules that are among these files and folders, as paths below ROOT."""
    others = frozenset[str]().union(*(other.modules for other in GROUPS if other.folder == group.folder))
    modules = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / group.folder).rglob("*.py")
        if (path.stem in group.modules if group.modules else path.stem not in others)
    )
    if not wanted:
        return modules
    named = [os.path.relpath(Path(name).resolve(), ROOT) for name in wanted]
    return [module for module in modules if any(module == n or module.startswith(n + "/") for n in named)]


def survivors(group: Group, modules: list[str], processes: int) -> dict[str, Counter[str] | None]:
    """The mutants of each module that no test notices; None: the run was interrupted before its end."""
    folder = WORK / group.name
    _copy_repository(folder)
    (folder / "setup.cfg").write_text(_settings(group, modules), encoding="utf-8")
    state = folder / "state.txt"
    fingerprint = _fingerprint(folder, group)
    if state.exists() and state.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(folder / "mutants", ignore_errors=True)
    state.write_text(fingerprint, encoding="utf-8")
    _forget_selection(folder, group, modules)
    mutmut = Path(sys.executable).with_name("mutmut")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [str(mutmut), "run", "--max-children", str(processes)]
    with suppress(KeyboardInterrupt):
        subprocess.run(command, cwd=folder, env=environment, check=True)
    return {module: _surviving(folder, module) for module in modules}


def _forget_selection(folder: Path, group: Group, modules: list[str]) -> None:
    """Let mutmut begin anew, but for its results, when the last run had other modules.

    It would take the plain copies of these modules for mutated ones, and their functions for untested.
    """
    selection = folder / "modules.txt"
    if not selection.exists() or selection.read_text(encoding="utf-8").split() != modules:
        (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
        for module in selected(group, []):
            (folder / "mutants" / module).unlink(missing_ok=True)
    selection.write_text("\n".join(modules), encoding="utf-8")


def _copy_repository(folder: Path) -> None:
    """Bring the copy that mutmut works in up to date: every file that git knows or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    names = {name for name in listed if name and (ROOT / name).exists()}
    for name in names:
        source, copy = ROOT / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.unlink(missing_ok=True)
            copy.symlink_to(source.readlink())
        elif not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copy2(source, copy)
    for top in ("deployments", "serve_app", "tests"):
        for copy in (folder / top).rglob("*.py"):
            if str(copy.relative_to(folder)) not in names:
                copy.unlink()


def _settings(group: Group, modules: list[str]) -> str:
    copied = ("configs", "models", "tools", "serve_config.yaml", "deployments", "serve_app")
    top = group.folder.split("/", maxsplit=1)[0]
    lists: dict[str, Iterable[str]] = {
        "source_paths": [top],
        "only_mutate": modules,
        "also_copy": [name for name in copied if name != top],
        "pytest_add_cli_args": [*PYTEST, f"--timeout={group.test_limit_s}"],
        "pytest_add_cli_args_test_selection": [
            *group.tests,
            *(f"--deselect={test}" for test in group.left_out),
        ],
    }
    lines = ["[mutmut]", "process_isolation = forkserver"]  # torch does not survive a plain fork once used
    lines += ["use_git_change_detection = false", "timeout_multiplier = 5", "timeout_constant = 10"]
    for name, entries in lists.items():
        lines += [f"{name} =", *(f"    {entry}" for entry in entries)]
    return "\n".join([*lines, ""])


def _fingerprint(folder: Path, group: Group) -> str:
    """Changes when a result of an earlier run may no longer hold, because the tests are others."""
    paths = [folder / name for name in group.tests]
    files = sorted({file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])})
    digest = hashlib.sha256()
    for file in [*files, *sorted((folder / "tests").glob("*.py"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _surviving(folder: Path, module: str) -> Counter[str] | None:
    """A line for each mutant of a module that the last run did not detect; None: there are some to try."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    results = folder / "mutants" / f"{module}.meta"
    if not results.exists():
        return None
    codes = json.loads(results.read_text(encoding="utf-8"))["exit_code_by_key"]
    if None in codes.values():
        return None
    survived = [name for name, code in codes.items() if code not in DETECTED]
    with chdir(folder):
        return Counter(
            f"{_function(name)}: {_change(get_diff_for_mutant(name, path=module))}" for name in survived
        )


def _function(mutant: str) -> str:
    """`Class.method` or `function` of a mutant's name."""
    name = mutant.rpartition(".")[2].partition("__mutmut_")[0].removeprefix("x")
    return ".".join(name.strip("ǁ").split("ǁ")) if name.startswith("ǁ") else name.removeprefix("_")


def _change(diff: str) -> str:
    """The changed lines of a unified diff, as one line."""
    lines = diff.splitlines()[2:]
    removed = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    added = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return f"{removed}  ->  {added}"


def read_list() -> dict[str, Counter[str]]:
    """The known survivors of each module."""
    known: dict[str, Counter[str]] = {}
    lines = LIST.read_text(encoding="utf-8").splitlines() if LIST.exists() else []
    for line in lines:
        if line.startswith("## "):
            module = line.removeprefix("## ").partition(":")[0]
            known[module] = Counter()
        elif line and not line.startswith("#"):
            known[module][line] += 1
    return known


def write_list(known: dict[str, Counter[str]]) -> None:
    """Sorted, a heading for each module."""
    parts = [HEADING]
    for module in sorted(known):
        if (ROOT / module).exists():
            parts += [f"\n## {module}: {known[module].total()}\n"]
            parts += [f"{mutant}\n" for mutant in sorted(known[module].elements())]
    LIST.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
