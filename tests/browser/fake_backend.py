"""The service as the page sees it, in one process without Ray: real schemas and limits, drawn pictures.

`python -m tests.browser.fake_backend` serves it on port 8123 for a manual check.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from deployments.media.movie import encode_segment, join
from deployments.media.video_spec import SEGMENT_FRAMES, VideoFiles, VideoSpec
from deployments.protocol.card import ControlNet, Guidance, Licence, ModelCard, Sizes, Steps, Videos, Weights
from deployments.protocol.errors import BadRequest, WeftError
from deployments.protocol.request import ResolvedRequest
from deployments.validation.resolve import resolve
from serve_app.api.middleware.security_headers import DATA_POLICY, PAGE_POLICY
from serve_app.api.native.image_body import ImageBody
from serve_app.api.native.video_body import VideoBody
from serve_app.api.page import PageVersion
from serve_app.api.schemas.job import JobAccepted, JobList, JobOut, WarningOut
from serve_app.api.schemas.lora import LoraList, LoraOut
from serve_app.api.schemas.model import ModelList, ModelOut
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, JobError, JobState, StoredArtifact
from serve_app.jobs.store.owner_index import ALL_JOBS, JobFilter
from tests.patience import patience

WEB = Path(__file__).resolve().parents[2] / "serve_app" / "web"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}

IMMUTABLE = {"Cache-Control": "private, max-age=31536000, immutable"}

SCHNELL = ModelCard(
    id="flux-schnell",
    name="FLUX.1 [schnell]",
    family="flux",
    weights=Weights(path="nowhere"),
    tasks=["t2i", "i2i", "inpaint"],
    steps=Steps(min=4, default=4, max=4),
    guidance=Guidance(min=0.0, default=0.0, max=0.0),
    sizes=Sizes(width=1024, height=1024),
    corrects=True,
    negative_prompt=False,
    licence=Licence(name="Apache-2.0", url="https://www.apache.org/licenses/LICENSE-2.0"),
)
SDXL = ModelCard(
    id="sdxl",
    name="Stable Diffusion XL",
    family="sdxl",
    weights=Weights(path="nowhere"),
    tasks=["t2i"],
    steps=Steps(min=1, default=30, max=80),
    guidance=Guidance(min=0.0, default=5.0, max=15.0),
    sizes=Sizes(width=1024, height=1024, multiple=8),
    schedulers=["auto", "euler", "dpm++"],
    controls={
        kind: ControlNet(weights=Weights(path="nowhere"), licence=Licence(name="Apache-2.0", url=""))
        for kind in ("canny", "depth")
    },
    refiner="sdxl-refiner",
    licence=Licence(name="OpenRAIL++", url="https://example.org", commercial=False),
)
TINY = ModelCard(
    id="tiny",
    name="Tiny",
    family="flux",
    weights=Weights(path="nowhere"),
    tasks=["t2i"],
    steps=Steps(min=4, default=4, max=4),
    guidance=Guidance(min=0.0, default=0.0, max=0.0),
    sizes=Sizes(width=128, height=128, min=64, max=256, max_pixels=65536),
    corrects=True,
    negative_prompt=False,
    licence=Licence(name="Apache-2.0", url="https://example.org"),
)


TINY_WAN = ModelCard(
    id="tiny-wan",
    name="Tiny Wan",
    family="wan",
    weights=Weights(path="nowhere"),
    tasks=["t2v"],
    steps=Steps(min=1, default=4, max=50),
    guidance=Guidance(min=1.0, default=3.0, max=8.0),
    sizes=Sizes(width=64, height=64, min=64, max=128, max_pixels=16384),
    videos=Videos(num_frames=17, fps=8, max_frames=129, every=4, max_frame_pixels=528384),
    licence=Licence(name="Apache-2.0", url="https://example.org"),
)
FRAMEWISE = ModelCard(
    id="framewise",
    name="Frame by frame",
    family="sd",
    weights=Weights(path="nowhere"),
    tasks=["t2i", "t2v", "i2v"],
    steps=Steps(min=1, default=4, max=50),
    guidance=Guidance(min=0.0, default=4.0, max=20.0),
    sizes=Sizes(width=128, height=128, min=64, max=256, max_pixels=65536),
    videos=Videos(num_frames=16, fps=8, max_frames=64, max_frame_pixels=1048576, framewise=True),
    strength=0.75,
    licence=Licence(name="Apache-2.0", url="https://example.org"),
)


def an_adapter(name: str, family: str, *trigger_words: str) -> LoraOut:
    """A registered LoRA as the page receives it."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return LoraOut(
        id=digest[:16],
        name=name,
        family=family,
        model=None,
        rank=8,
        dtype="BF16",
        size_bytes=1000,
        sha256=digest,
        trigger_words=list(trigger_words),
        description="",
        licence="",
        source="upload",
        notes=[],
        public=False,
        mine=True,
        preview_url=None,
        created_at=1.0,
    )


@dataclass(slots=True)
class Running:
    """One job and its published events. Changed under `FakeBackend.changed` only."""

    job: Job
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)  # or the one video
    stills: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # of a video: media type and file


class FakeBackend:
    """Set its fields to make it slow, broken or strict; everything it was sent is in `received`."""

    def __init__(self, port: int = 0, prefix: str = "") -> None:
        self.loras = [an_adapter("ink", "sdxl", "inky"), an_adapter("night", "flux")]
        self.prefix = prefix  # in front of every address, as behind a proxy
        self.cards = [SCHNELL, SDXL]
        self.states: dict[str, str] = {}  # by id; ready where missing
        self.key: str | None = None
        self.step_s = 0.03
        self.hold: str | None = None  # decode, encode: videos stop in the middle of it until `release`
        self.queue_s = 0.0
        self.steps_shown: int | None = None  # reported instead of the request's steps
        self.ahead = 0
        self.previews = True
        self.fail: JobError | None = None  # every job fails with it after its first step
        self.refuse: tuple[int, dict[str, Any], dict[str, str]] | None = None  # the answer to every POST
        self.cut_streams = 0  # so many event streams break after two events
        self.answers = threading.Event()  # while it is clear, no POST of a job is answered
        self.answers.set()
        self.version = PageVersion(WEB)
        self.page_requests: list[str] = []  # files of the page that were asked for
        self.down = False  # every call to the API is hung up on
        self.received: list[dict[str, Any]] = []
        self.resumed_from: list[str] = []  # Last-Event-ID headers seen
        self.jobs: dict[str, Running] = {}
        self.changed = threading.Condition()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{self.prefix}/ui/"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def _handler(self) -> type[Handler]:
        return type("BoundHandler", (Handler,), {"backend": self})

    # ---- what the service does ----
    def submit(self, body: dict[str, Any], schema: type[ImageBody | VideoBody] = ImageBody) -> Job:
        """The job of a request, already being worked on. Raises WeftError."""
        parsed = schema.model_validate(body)
        card = next(card for card in self.cards if card.id == parsed.model)
        resolved = resolve(parsed.to_request(card.id), card, fresh_seed=secrets.randbits(63) >> 1)
        job = Job(
            id=new_job_id(),
            owner="anyone",
            state=JobState.queued,
            request=resolved.request,
            created_at=time.time(),
            warnings=resolved.adjustments,
        )
        with self.changed:
            self.jobs[job.id] = Running(job)
        threading.Thread(target=self._work, args=(job.id,), daemon=True).start()
        return job

    def release(self, hold: str | None = None) -> None:
        """Lets videos continue, up to `hold`."""
        with self.changed:
            self.hold = hold
            self.changed.notify_all()

    def add_finished_video(self, prompt: str, seed: int, card: ModelCard) -> None:
        """A video of the past."""
        job = self.submit({"model": card.id, "prompt": prompt, "seed": seed}, VideoBody)
        with self.changed:
            assert self.changed.wait_for(lambda: self.jobs[job.id].job.state.ended, timeout=patience(2))

    def add_finished(
        self, prompt: str, seed: int, state: JobState = JobState.completed, **fields: Any
    ) -> None:
        """A job of the past. fields: more of its request."""
        speed, self.step_s = self.step_s, 0.0
        job = self.submit(
            {"model": self.cards[0].id, "prompt": prompt, "seed": seed, "width": 256, "height": 256} | fields
        )
        with self.changed:
            assert self.changed.wait_for(lambda: self.jobs[job.id].job.state.ended, timeout=patience())
            running = self.jobs[job.id]
            failure = JobError("internal", "the engine died") if state is JobState.failed else None
            kept = running.job.artifacts if state is JobState.completed else ()
            running.job = replace(running.job, state=state, error=failure, artifacts=kept)
        self.step_s = speed

    def _work(self, job_id: str) -> None:
        request = self.jobs[job_id].job.request
        self._publish(job_id, "queued", {"status": "queued", "position": self.ahead + 1}, {})
        if not self._pause(job_id, self.queue_s):
            return
        began = time.time()
        self._publish(job_id, "started", {"steps": None}, {"state": JobState.processing, "started_at": began})
        steps = self.steps_shown or request.num_inference_steps
        image = draw(request.seed, request.width, request.height)
        for step in range(steps + 1):
            if not self._pause(job_id, self.step_s if step else 0):
                return
            data = {"step": step, "steps": steps, "percent": min(99, 100 * step // steps)}
            self._publish(job_id, "step", data, {"step": step, "steps": steps})
            if self.fail is not None and step == 1:
                failure = {"kind": self.fail.kind, "message": self.fail.message, "param": self.fail.param}
                change = {"state": JobState.failed, "error": self.fail}
                self._publish(job_id, "failed", {"status": "failed", "error": failure}, change)
                return
            if self.previews and request.video is None and 0 < step < steps:
                self._publish(job_id, "preview", preview(image, step, steps), {})
        if request.video is not None:
            if self._stages(job_id, request.video.num_frames):
                self._finish_video(job_id, image, time.time() - began)
            return
        self._finish(job_id, image, time.time() - began)

    def _stages(self, job_id: str, frames: int) -> bool:
        """False when the job was cancelled meanwhile."""
        for stage in ("decode", "encode"):
            for done in (frames // 2, frames):
                data = {"status": "processing", "percent": 99, "stage": stage, "done": done, "total": frames}
                self._publish(job_id, "stage", data, {})
                if not self._pause(job_id, 60, lambda stage=stage: self.hold != stage):
                    return False
        return True

    def _finish_video(self, job_id: str, image: Image.Image, took_s: float) -> None:
        running = self.jobs[job_id]
        request = running.job.request
        files = make_video(image, request)
        media_type = f"video/{request.video.format}"
        stills = {"thumbnail": files.thumbnail, "poster": files.poster}
        artifacts = [
            StoredArtifact(0, kind, "", kind_type, len(data), "", request.width, request.height, request.seed)
            for kind, kind_type, data in [
                ("video", media_type, files.video),
                *((name, still.media_type, still.data) for name, still in stills.items()),
            ]
        ]
        with self.changed:
            running.pictures = [files.video]
            running.stills = {name: (still.media_type, still.data) for name, still in stills.items()}
        change = {
            "state": JobState.completed,
            "artifacts": tuple(artifacts),
            "generation_s": round(took_s, 2),
        }
        self._publish(job_id, "completed", {"status": "completed", "percent": 100}, change)

    def _finish(self, job_id: str, image: Image.Image, took_s: float) -> None:
        running = self.jobs[job_id]
        request = running.job.request
        files, artifacts = [], []
        for index in range(request.num_images):
            picture = image if index == 0 else draw(request.seed + index, request.width, request.height)
            buffer = io.BytesIO()
            picture.save(buffer, request.output.format.upper(), compress_level=1)
            files.append(buffer.getvalue())
            media_type = f"image/{request.output.format}"
            for kind in ("image", "thumbnail"):
                artifacts.append(
                    StoredArtifact(
                        index,
                        kind,
                        "",
                        media_type,
                        len(files[-1]),
                        "",
                        request.width,
                        request.height,
                        request.seed + index,
                    )
                )
        with self.changed:
            running.pictures = files
        change = {
            "state": JobState.completed,
            "artifacts": tuple(artifacts),
            "generation_s": round(took_s, 2),
        }
        self._publish(job_id, "completed", {"status": "completed", "percent": 100}, change)

    def _pause(self, job_id: str, seconds: float, free: Callable[[], bool] = lambda: False) -> bool:
        """False when the job was cancelled meanwhile. Ends when `free` is set."""
        with self.changed:
            running = self.jobs[job_id]
            self.changed.wait_for(lambda: running.job.cancel_requested or free(), timeout=seconds)
            cancelled = running.job.cancel_requested
        if cancelled:
            self._publish(job_id, "cancelled", {"status": "cancelled"}, {"state": JobState.cancelled})
        return not cancelled

    def _publish(self, job_id: str, name: str, data: dict[str, Any], change: dict[str, Any]) -> None:
        with self.changed:
            running = self.jobs[job_id]
            running.job = replace(running.job, **change)
            running.events.append((name, data))
            self.changed.notify_all()

    def cancel(self, job_id: str) -> str:
        with self.changed:
            running = self.jobs[job_id]
            if running.job.state.ended:
                del self.jobs[job_id]
                return "deleted"
            running.job = replace(running.job, cancel_requested=True)
            self.changed.notify_all()
            return "cancelling"

    def described(self, job: Job) -> JobOut:
        position = self.ahead + 1 if job.state is JobState.queued else None
        return JobOut.of(job, "", position)  # "": it does not know what a proxy put in front


class Handler(BaseHTTPRequestHandler):
    """Addresses to the backend's deeds."""

    backend: FakeBackend
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_DELETE(self) -> None:
        self._route()

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = url.path.removeprefix(self.backend.prefix)
        if path.startswith("/ui/"):
            self._page(path.removeprefix("/ui/") or "index.html")
            return
        if self.backend.down:
            self.close_connection = True
            return
        if (
            path == "/auth/session"
            and self.command == "POST"
            and json.loads(body)["api_key"] == self.backend.key
        ):
            self._json(200, "{}", {"Set-Cookie": "weft_session=open; Path=/; HttpOnly; SameSite=Strict"})
            return
        if self.backend.key is not None and not self._known():
            self._refuse(401, "unauthorized", "send your key as Authorization: Bearer <key>")
            return
        if path == "/auth/session" and self.command == "DELETE":
            self._json(200, "{}", {"Set-Cookie": "weft_session=; Path=/; Max-Age=0"})
            return
        parts = path.removeprefix("/api/").split("/")
        try:
            self._api(parts, parse_qs(url.query), body)
        except KeyError:
            self._refuse(404, "not_found", "there is no such job")
        except WeftError as error:
            self._refuse(422, error.kind, error.message, error.param)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the page left the stream

    def _known(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {self.backend.key}":
            return True
        by_cookie = "weft_session=open" in (self.headers["Cookie"] or "")
        return by_cookie and (self.command == "GET" or "X-Weft-CSRF" in self.headers)

    def _api(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        backend = self.backend
        match self.command, parts:
            case "GET", ["models", ""]:
                cards = [ModelOut.of(card, backend.states.get(card.id, "ready")) for card in backend.cards]
                self._json(200, ModelList(models=cards, adapters=[]).model_dump_json())
            case "GET", ["loras"]:
                self._json(200, LoraList(loras=backend.loras).model_dump_json())
            case "POST", ["loras"]:
                backend.loras.append(an_adapter("uploaded", "sdxl"))
                self._json(201, backend.loras[-1].model_dump_json())
            case "POST", ["generate", ("image" | "video") as kind]:
                sent = json.loads(body)
                backend.received.append(sent)
                assert backend.answers.wait(patience(2))
                if backend.refuse is not None:
                    status, error, headers = backend.refuse
                    self._json(status, json.dumps({"error": error}), headers)
                    return
                job = backend.submit(sent, VideoBody if kind == "video" else ImageBody)
                accepted = JobAccepted(
                    id=job.id, status=job.state, warnings=[WarningOut.of(w) for w in job.warnings]
                )
                self._json(202, accepted.model_dump_json())
            case "GET", ["generate", ""]:
                only = query.get("kind", [None])[0]
                admits = JobFilter(kind=only).admits if only in ("image", "video") else ALL_JOBS.admits
                jobs = [running.job for running in backend.jobs.values() if admits(running.job)][::-1]
                limit = int(query.get("limit", ["20"])[0])
                listed = [JobOut.of(job, "") for job in jobs[:limit]]
                self._json(200, JobList(jobs=listed, next_cursor=None).model_dump_json())
            case "GET", ["generate", job_id, "events"]:
                self._events(backend.jobs[job_id])
            case "GET", ["generate", job_id]:
                self._json(200, backend.described(backend.jobs[job_id].job).model_dump_json())
            case "DELETE", ["generate", job_id]:
                self._json(200, json.dumps({"id": job_id, "status": backend.cancel(job_id)}))
            case "GET", ["results", job_id, name]:
                self._picture(backend.jobs[job_id], int(name.split(".")[0]))
            case "GET", ["results", job_id, index, still]:
                running = backend.jobs[job_id]
                if running.job.request.video is None:
                    self._picture(running, int(index))
                else:
                    self._bytes(200, *running.stills[still], IMMUTABLE)
            case _:
                raise BadRequest(f"there is no {self.command} {self.path}")

    def _events(self, running: Running) -> None:
        backend = self.backend
        last = self.headers["Last-Event-ID"]
        if last is not None:
            backend.resumed_from.append(last)
        cut = backend.cut_streams > 0
        backend.cut_streams -= int(cut)
        self.close_connection = True
        self._head(200, "text/event-stream", {"Connection": "close"})
        sent = int(last.split("-")[0]) if last else 0
        sent_events = 0
        while True:
            with backend.changed:
                if len(running.events) == sent:
                    backend.changed.wait(timeout=1)
                events = running.events[sent:]
            for name, data in events:
                sent += 1
                sent_events += 1
                self.wfile.write(f"id: {sent}-0\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode())
                self.wfile.flush()
                if cut and sent_events == 2:
                    return
                if name in ("completed", "failed", "cancelled"):
                    return
            if backend.down:
                return

    def _picture(self, running: Running, index: int) -> None:
        request = running.job.request
        media_type = (
            f"image/{request.output.format}" if request.video is None else f"video/{request.video.format}"
        )
        self._bytes(200, media_type, running.pictures[index], IMMUTABLE)

    def _page(self, asked: str) -> None:
        self.backend.page_requests.append(asked)
        name, caching = self.backend.version.split(asked)
        path = (WEB / name).resolve()
        if not path.is_relative_to(WEB) or not path.is_file():
            self._refuse(404, "not_found", f"there is no {name}")
            return
        headers = {"Cache-Control": caching, "Content-Security-Policy": PAGE_POLICY}
        data = self.backend.version.document().encode() if name == "index.html" else path.read_bytes()
        self._bytes(200, MEDIA_TYPES[path.suffix], data, headers)

    def _refuse(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        error = {"kind": kind, "message": message, "param": param, "retryable": status >= 500}
        self._json(status, json.dumps({"error": error}))

    def _json(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        policy = {"Content-Security-Policy": DATA_POLICY, "Cache-Control": "no-store"}
        self._bytes(status, "application/json", text.encode(), policy | (headers or {}))

    def _bytes(self, status: int, media_type: str, data: bytes, headers: dict[str, str]) -> None:
        self._head(status, media_type, {"Content-Length": str(len(data)), **headers})
        self.wfile.write(data)

    def _head(self, status: int, media_type: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def draw(seed: int, width: int, height: int) -> Image.Image:
    """Hills under a sun; the same seed gives the same picture."""
    rng = np.random.default_rng(seed)
    w, h = max(1, width // 4), max(1, height // 4)
    y, x = np.mgrid[0:h, 0:w] / np.array([h, w]).reshape(2, 1, 1)
    hue = rng.uniform(0, 2 * np.pi)
    wheel = np.array([0.0, 2.1, 4.2])
    top = 0.5 + 0.35 * np.cos(hue + wheel)
    bottom = 0.62 + 0.33 * np.cos(hue + 1.3 + wheel)
    sky = top + (bottom - top) * y[..., None]
    cx, cy = rng.uniform(0.25, 0.75), rng.uniform(0.2, 0.45)
    distance = np.hypot((x - cx) * w / h, y - cy)
    sky = sky + np.exp(-((distance / 0.16) ** 2))[..., None] * (np.array([1.0, 0.95, 0.8]) - sky)
    picture = sky
    for layer in range(4):
        phase, bumps = rng.uniform(0, 6.3, 2), rng.uniform(2, 9, 2)
        ridge = (
            0.55
            + 0.11 * layer
            + 0.06 * np.sin(bumps[0] * x + phase[0])
            + 0.025 * np.sin(3 * bumps[1] * x + phase[1])
        )
        colour = bottom * (0.62 - 0.14 * layer)
        picture = np.where((y > ridge)[..., None], colour, picture)
    pixels = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def make_video(image: Image.Image, request: ResolvedRequest) -> VideoFiles:
    """The drawing moving sideways, encoded as the service does it."""
    video = request.video
    assert video is not None
    still = np.asarray(image.convert("RGB"))
    frames = np.stack([np.roll(still, 2 * number, axis=1) for number in range(video.num_frames)])
    spec = VideoSpec(request.width, request.height, video.num_frames, video.fps, video.format)
    chunks = [frames[first : first + SEGMENT_FRAMES] for first in range(0, len(frames), SEGMENT_FRAMES)]
    return join(spec, [encode_segment(spec, at, [chunk], 1) for at, chunk in enumerate(chunks)])


def preview(image: Image.Image, step: int, steps: int) -> dict[str, Any]:
    """A small noisy JPEG, clearer with every step."""
    small = image.resize((96, max(1, round(96 * image.height / image.width))))
    noise = np.random.default_rng(step).normal(128, 70, (small.height, small.width, 3))
    share = step / steps
    mixed = np.asarray(small) * share + noise * (1 - share)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=70)
    return {"step": step, "media_type": "image/jpeg", "data": base64.b64encode(buffer.getvalue()).decode()}


if __name__ == "__main__":
    backend = FakeBackend(port=8123)
    backend.step_s = 0.4
    print(backend.url)
    threading.Event().wait()
