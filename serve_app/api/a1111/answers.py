"""The answer of txt2img and img2img."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from deployments.protocol.adjustment import Adjustment
from serve_app.api.a1111.names import NAMES
from serve_app.api.a1111.png_text import png_texts
from serve_app.api.a1111.samplers import label
from serve_app.api.a1111.schemas import GenerationBody, ImagesOut
from serve_app.api.caller import CallerContext
from serve_app.api.foreign import renamed_notice
from serve_app.jobs.job import Job, JobState

PICTURES = {"init_images", "mask", "alwayson_scripts"}


async def images_out(
    caller: CallerContext, body: GenerationBody, jobs: Sequence[Job], notices: Sequence[Adjustment] = ()
) -> ImagesOut:
    """The images of completed jobs, their seeds and settings. notices: warnings that no job has."""
    files: list[bytes] = []
    seeds: list[int] = []
    for job in jobs:
        if job.state is not JobState.completed:
            continue
        for artifact in job.artifacts:
            if artifact.kind == "image":
                _, data = await caller.job_service.artifact(job.id, caller.owner, artifact.index, "image")
                files.append(data)
                seeds.append(artifact.seed)
    images = [base64.b64encode(file).decode() for file in files]
    return ImagesOut(
        images=images if body.send_images else [],
        parameters=body.model_dump(mode="json", exclude=PICTURES),
        info=json.dumps(_info(jobs, files, seeds, notices)),
    )


def _info(
    jobs: Sequence[Job], files: Sequence[bytes], seeds: Sequence[int], notices: Sequence[Adjustment]
) -> dict[str, Any]:
    job, count = jobs[0], len(files)
    request, edit = job.request, job.request.edit
    every = dict.fromkeys([*notices, *(warning for job in jobs for warning in job.warnings)])
    warnings = [renamed_notice(notice, NAMES) for notice in every]
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * count,
        "seed": seeds[0] if seeds else request.seed,
        "all_seeds": seeds,
        "subseed": seeds[0] if seeds else request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": label(request.scheduler),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": request.num_images,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": request.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None if edit is None else edit.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [png_texts(file).get("parameters", "") for file in files],
        "styles": [],
        "job_timestamp": datetime.fromtimestamp(job.created_at, UTC).strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "job_ids": [job.id for job in jobs],
        "warnings": [
            {"code": notice.code, "param": notice.param, "message": notice.message} for notice in warnings
        ],
    }
