"""Code in the folder of a model's weights never runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TRUSTING = """
import sys
import deployments  # what every replica imports first
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print("refused:", error)
"""


def test_a_snapshot_with_a_pipeline_of_its_own_is_refused_even_with_trust_remote_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "Evil"]}))
    (snapshot / "pipeline.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from diffusers import DiffusionPipeline\n"
        "class Evil(DiffusionPipeline):\n    def __init__(self):\n        super().__init__()\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", TRUSTING, str(snapshot)], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert "refused:" in done.stdout, done.stderr
    assert not canary.exists()
