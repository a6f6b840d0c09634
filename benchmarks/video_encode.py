"""Frames to a playable file: Weft's encoder compared with the ffmpeg program and diffusers' export_to_video.

Three figures. Frames encoded per second, by size and threads, with the settings of the ffmpeg command line
behind a pipe (`encode_vs_ffmpeg`: our time over ffmpeg's, worst case). Seconds from the last denoising step
to the file: encoding while decoding, over encoding afterwards (`video_streamed_vs_waiting`) and over
exporting afterwards (`video_end_to_end_vs_export`); frames arrive at the pace of a GPU's decoder, and once
more from the tiny VAE on this CPU (`_on_cpu`), whose decoding takes most of the time. Peak memory of each
variant for long videos.

Needs `pip install -e '.[bench]'` and about four minutes on two cores. Variants are interleaved; the medians
are kept, the spread is min-max.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import ledger
import numpy as np
import numpy.typing as npt
import torch
from diffusers.utils import export_to_video

from deployments.encoder import VideoEncoder
from deployments.executors.video_encoding import Encoder, EncodingSession
from deployments.media import movie
from deployments.media.video_spec import SEGMENT_FRAMES, Segment, VideoFiles, VideoSpec
from deployments.models.load import load_pipeline
from deployments.pipelines.latent_decoder import CHUNK_FRAMES, LatentDecoder, latent_decoder
from deployments.protocol.card import Weights

SIZES = {"480p": (832, 480), "720p": (1280, 720), "1080p": (1920, 1080)}
FPS = 24
QUALITY = 80
CRF = "18"  # what quality 80 means for H.264
Clip = npt.NDArray[np.uint8]


def clip(count: int, width: int, height: int) -> Clip:
    """Frames of moving waves over fixed grain, about as compressible as film."""
    generator = np.random.default_rng(0)
    grain = generator.normal(0, 6, (height, width, 3)).astype(np.float32)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    frames = np.empty((count, height, width, 3), np.uint8)
    for k in range(count):
        red = 128 + 90 * np.sin(columns / 97 + k / 9) * np.cos(rows / 61)
        green = 128 + 90 * np.sin(rows / 83 + k / 11)
        blue = 128 + 90 * np.cos((rows + columns) / 139 - k / 13)
        frames[k] = (np.stack([red, green, blue], -1) + grain).clip(0, 255)
    return frames


def ours(encoder: VideoEncoder, frames: Clip) -> bytes:
    """Encode as a replica does: segments, then joined."""
    count, height, width, _ = frames.shape

    async def encoded() -> bytes:
        async with EncodingSession(
            encoder, VideoSpec(width, height, count, FPS, quality=QUALITY)
        ) as encoding:
            await encoding.add(frames)
            return (await encoding.files()).video

    return asyncio.run(encoded())


def command_line(frames: Clip, threads: int) -> bytes:
    """Encode with the ffmpeg program and the same settings, frames through its standard input."""
    _, height, width, _ = frames.shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {FPS} -i -"
        coding = f"-c:v libx264 -preset veryfast -crf {CRF} -g {SEGMENT_FRAMES} -threads {threads}"
        colours = "-vf scale=out_color_matrix=bt709:out_range=tv -pix_fmt yuv420p -colorspace bt709"
        program = imageio_ffmpeg.get_ffmpeg_exe()
        words = f"-v error -y {source} {coding} {colours} -movflags +faststart {path}"
        with subprocess.Popen([program, *words.split()], stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            for frame in frames:
                process.stdin.write(frame)
            process.stdin.close()
            assert process.wait() == 0
        return path.read_bytes()


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each side takes, round by round."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - began)
    return seconds


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Our time over theirs, round by round: below 1 is faster."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def encode(frames: Clip, size: str, threads: int, rounds: int, keep: bool) -> list[float]:
    """Our time over the command line's, round by round."""
    sides: dict[str, Callable[[], object]] = {
        "weft": partial(ours, VideoEncoder(threads, concurrency=threads), frames),
        "ffmpeg": partial(command_line, frames, threads),
    }
    seconds = in_turns(sides, rounds)
    name, notes = f"{size}_{threads}_threads", f"{len(frames)} frames"
    for side, taken in seconds.items():
        rates = [len(frames) / one for one in taken]
        report(f"encode_{name}_{side}", rates, "frames/s", keep, notes)
    against = ratios(seconds["weft"], seconds["ffmpeg"])
    report(f"encode_vs_ffmpeg_{name}", against, "x", keep, notes)
    return against


def report(name: str, values: list[float], unit: str, keep: bool, notes: str) -> None:
    median, spread = statistics.median(values), f"{min(values):.3g}-{max(values):.3g}"
    if keep:
        ledger.record(name, median, unit, spread=spread, n=len(values), notes=notes)
    else:
        print(f"{name} = {median:.4g} {unit}  {spread}  {notes}", flush=True)


class OtherProcessEncoder:
    """Runs the work of a VideoEncoder in another process, so that its memory is not counted."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=context)
        self._process.submit(int).result()  # started before any clock runs

    async def segment(self, spec: VideoSpec, index: int, *chunks: Clip) -> Segment:
        work = partial(movie.encode_segment, spec, index, chunks, 1)
        return await asyncio.get_running_loop().run_in_executor(self._process, work)

    async def join(self, spec: VideoSpec, segments: Sequence[Segment]) -> VideoFiles:
        work = partial(movie.join, spec, segments)
        return await asyncio.get_running_loop().run_in_executor(self._process, work)


@dataclass(frozen=True)
class Film:
    """A denoised video and the ways to decode it."""

    width: int
    height: int
    latent_decoder: Callable[[], LatentDecoder]  # decodes it part by part
    whole: Callable[[], list[npt.NDArray[np.float32]]]  # decodes it at once; frames as diffusers gives them
    encoder: Encoder

    def ways(self) -> dict[str, Callable[[], object]]:
        """Functions from latents to the bytes of a playable file, by name."""
        return {"streamed": self.streamed, "one_after_the_other": self.waiting, "exported": self.exported}

    @torch.inference_mode()
    def streamed(self) -> bytes:
        """Decode part by part while earlier frames are encoded."""
        return asyncio.run(self._encoded(wait=False))

    @torch.inference_mode()
    def waiting(self) -> bytes:
        """Decode part by part; encode after the last frame."""
        return asyncio.run(self._encoded(wait=True))

    async def _encoded(self, *, wait: bool) -> bytes:
        video = self.latent_decoder()
        spec = VideoSpec(self.width, self.height, video.total, FPS, quality=QUALITY)
        held: list[Clip] = []
        async with EncodingSession(self.encoder, spec) as encoding:
            while (frames := await asyncio.to_thread(video.next_frames)) is not None:
                if wait:
                    held.append(frames)
                else:
                    await encoding.add(frames)
            for frames in held:
                await encoding.add(frames)
            return (await encoding.files()).video

    @torch.inference_mode()
    def exported(self) -> bytes:
        """Decode as a whole, then export with diffusers."""
        frames = self.whole()
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/video.mp4"
            export_to_video(frames, path, fps=FPS)
            return Path(path).read_bytes()


def tiny_wan(latents: int, side: int) -> Film:
    """A video of the Wan that ships, of any length and size, decoded by one thread."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(Weights(path="models/tiny-wan", dtype="float32"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, 16, latents, side // 8, side // 8, generator=generator)

    def whole() -> list[npt.NDArray[np.float32]]:
        decoded = pipeline.vae.decode(given).sample
        return list(pipeline.video_processor.postprocess_video(decoded, output_type="np")[0])

    return Film(side, side, lambda: latent_decoder(pipeline, given), whole, OtherProcessEncoder())


class PacedDecoder:
    """A LatentDecoder that returns given frames at a steady pace, as a GPU would, without using the CPU."""

    def __init__(self, frames: Clip, pace: float) -> None:
        """pace: frames a second."""
        self.total = len(frames)
        self._frames, self._pace, self._taken = frames, pace, 0

    def next_frames(self) -> Clip | None:
        chunk = self._frames[self._taken : self._taken + CHUNK_FRAMES]
        self._taken += len(chunk)
        time.sleep(len(chunk) / self._pace)
        return chunk if len(chunk) else None


def paced(frames: Clip, pace: float) -> Film:
    floats = list(frames.astype(np.float32) / 255)

    def whole() -> list[npt.NDArray[np.float32]]:
        time.sleep(len(frames) / pace)
        return floats

    _, height, width, _ = frames.shape
    return Film(width, height, lambda: PacedDecoder(frames, pace), whole, VideoEncoder(2))


def peak_mib(way: str, latents: int, side: int) -> float:
    """Peak memory of a separate process, above its memory with the model loaded."""
    words = ["--memory-of", way, "--side", str(side), "--latents", str(latents)]
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def end_to_end(film: Film, rounds: int, keep: bool, notes: str, suffix: str = "") -> None:
    """Measure seconds from the last denoising step to the file, for each variant."""
    seconds = in_turns(film.ways(), rounds)
    for way, taken in seconds.items():
        report(f"video_last_step_to_file_{way}_s{suffix}", taken, "s", keep, notes)
    ours, waiting, exported = seconds.values()
    report(f"video_streamed_vs_waiting{suffix}", ratios(ours, waiting), "x", keep, notes)
    report(f"video_end_to_end_vs_export{suffix}", ratios(ours, exported), "x", keep, notes)


def print_peak(film: Film, way: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_mib("VmRSS")
    film.ways()[way]()
    print(memory_mib("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=96, help="of each encoded clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--latents", type=int, default=17, help="of the film for overlap and memory; 4 frames each"
    )
    parser.add_argument("--side", type=int, default=256, help="of that film, pixels")
    parser.add_argument("--pace", type=float, default=20.0, help="frames a second that a GPU decodes")
    parser.add_argument("--no-film", action="store_true", help="encoding alone")
    parser.add_argument("--dry", action="store_true", help="record nothing")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print_peak(tiny_wan(args.latents, args.side), args.memory_of)
        return
    keep = not args.dry
    worst: list[float] = []
    for size in args.sizes:
        frames = clip(args.frames, *SIZES[size])
        for threads in args.threads:
            against = encode(frames, size, threads, args.rounds, keep)
            worst = max(worst or against, against, key=statistics.median)
        del frames
    report("encode_vs_ffmpeg", worst, "x", keep, f"the worst of {args.sizes} on {args.threads} threads")
    if args.no_film:
        return
    pace = f"{args.frames} frames of 1280x720 that come at {args.pace:g} a second, as from a GPU; 2 threads"
    end_to_end(paced(clip(args.frames, *SIZES["720p"]), args.pace), args.rounds, keep, pace)
    notes = f"{1 + 4 * (args.latents - 1)} frames of {args.side}x{args.side}, tiny-wan's VAE, 1 thread each"
    end_to_end(film := tiny_wan(args.latents, args.side), args.rounds, keep, notes, "_on_cpu")
    for way in film.ways():
        peak = peak_mib(way, args.latents, args.side)
        report(f"video_memory_peak_{way}_mib", [peak], "MiB", keep, f"{notes}; above the loaded model")


if __name__ == "__main__":
    main()
