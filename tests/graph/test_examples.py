"""examples/offline_batch.py as a Ray job: killed in the middle, it goes on where it was."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.graph.clusters import RayCluster
from tests.graph.running import until

pytestmark = pytest.mark.ray

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "star")]
STEPS = (20, 60, 100, 140, 180, 600)  # the first is done long before the last


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    pairs = zip(PROMPTS, STEPS, strict=True)
    lines = [json.dumps({"prompt": prompt, "num_inference_steps": steps}) for prompt, steps in pairs]
    file.write_text("\n".join(lines))
    return file


def pictures(folder: Path) -> dict[str, int]:
    """Name to the time when it was written, in nanoseconds."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}


def test_a_batch_that_was_killed_goes_on_where_it_was(
    ray_cluster: RayCluster, prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    jobs = JobSubmissionClient(ray_cluster.dashboard)
    command = [sys.executable, "-m", "examples.offline_batch", str(prompts), str(folder)]
    entrypoint = shlex.join([*command, "--model", "slow-flux", "--actors", "1"])

    first = jobs.submit_job(entrypoint=entrypoint)
    until(lambda: pictures(folder) or ended(jobs, first), "a picture is there", every_s=0.2)
    (driver,) = [one for one in psutil.process_iter() if one.name() != "sh" and str(folder) in arguments(one)]
    driver.kill()
    until(lambda: ended(jobs, first), "the first job ends", every_s=0.5)
    there = pictures(folder)
    second = jobs.submit_job(entrypoint=entrypoint)
    until(lambda: ended(jobs, second), "the second job ends", every_s=0.5)

    log = jobs.get_job_logs(second)
    assert jobs.get_job_status(first) == JobStatus.FAILED
    assert jobs.get_job_status(second) == JobStatus.SUCCEEDED, log
    assert 0 < len(there) < len(PROMPTS), "the first was killed in the middle"
    assert f"{len(PROMPTS)} prompts, {len(there)} of them done before" in log
    now = pictures(folder)
    assert len(now) == len(PROMPTS)
    assert {name: now[name] for name in there} == there, "what was there was not made again"
    assert {Image.open(io.BytesIO(file.read_bytes())).size for file in folder.glob("*.png")} == {(128, 128)}


def ended(jobs: JobSubmissionClient, job: str) -> bool:
    return bool(jobs.get_job_status(job).is_terminal())


def arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
