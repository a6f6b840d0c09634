"""Memory of the host and seconds while the parts of FLUX.1-dev are loaded, from random files of their sizes.

Each part is written in shards as large as those of its repository and loaded in a process of its own, as the
service does and in other ways, in turns: by a plain from_pretrained, which maps the files; by one that reads
them (`read`); and by one that takes shards in parallel or, of transformers, which does so anyway, one tensor
after the other (`serial`). Files of another dtype than the part's make every tensor a copy, as on a GPU. The
extra memory is the peak of the resident set beyond the baseline and beyond the loaded part, which on a GPU
would not be on the host; the anonymous memory is the same without the pages of mapped files, which the system
takes back when it needs them. The transformer has a third of its blocks, in shards of a third: 22 GiB and
their copy are too much for a machine of 24 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 2**30
SHARD_BYTES = {
    "transformer": 9_980_000_000 // 3,
    "text_encoder_2": 4_990_000_000,
}  # of black-forest-labs/FLUX.1-dev
WAYS = {  # of loading, with what the environment says
    "parts": {},
    "plain": {},
    "read": {},
    "parallel": {"HF_ENABLE_PARALLEL_LOADING": "1"},
    "serial": {"HF_DEACTIVATE_ASYNC_LOAD": "1"},
}
PARTS = ("vae", "text_encoder", "text_encoder_2", "transformer")
CASES = {  # dtype of the file, dtype of the part
    "same": (torch.bfloat16, "bfloat16"),
    "cast": (torch.bfloat16, "float16"),
    "float32": (torch.float32, "bfloat16"),
}


def empty(part: str) -> Any:
    """The module of this part without values."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if part == "transformer":
            third = {"num_layers": 6, "num_single_layers": 13, "guidance_embeds": True}
            return diffusers.FluxTransformer2DModel(**third)
        if part == "text_encoder_2":
            sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
            return transformers.T5EncoderModel(
                transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
            )
        if part == "text_encoder":
            return transformers.CLIPTextModel(
                transformers.CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
                )
            )
        return diffusers.AutoencoderKL(
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )


def write(part: str, dtype: torch.dtype, folder: Path) -> None:
    """Random weights of this part in shards; never more than one shard is in memory."""
    from safetensors.torch import save_file

    module = empty(part)
    stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
    module.config.save_pretrained(folder) if stem == "model" else module.save_config(folder)
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, tensor in module.state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if filled + size > SHARD_BYTES.get(part, 10**12) and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.shape
        filled += size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        whole = f"{stem}.safetensors"
        file = whole if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        noise = torch.randn(2**20).to(dtype)
        tensors = {}
        for name, shape in shard.items():
            flat = torch.empty(shape.numel(), dtype=dtype)
            for start in range(0, len(flat), len(noise)):
                piece = flat[start : start + len(noise)]
                piece.copy_(noise[: len(piece)])
            tensors[name] = flat.view(shape)
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )


class Peak:
    """The largest resident set of this process while the block runs, by what is in it."""

    def __enter__(self) -> Peak:
        self.most = self.anonymous = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.005):
            memory = process.memory_info()
            self.most = max(self.most, memory.rss)
            self.anonymous = max(self.anonymous, memory.rss - memory.shared)


def load_once(part: str, folder: Path, way: str, dtype: str) -> None:
    """Load the part in this process and print what it took as JSON."""
    from deployments.models.model_memory import weights_bytes
    from deployments.models.parts import PartFiles
    from deployments.models.weight_files import find_weights
    from deployments.planning.plan import PartPlan

    kind = type(empty(part))
    name = "dtype" if part.startswith("text") else "torch_dtype"
    options: dict[str, Any] = {name: getattr(torch, dtype), "use_safetensors": True}
    if way == "read":
        options["disable_mmap"] = True
    before = psutil.Process().memory_info()
    started = time.perf_counter()
    with Peak() as peak:
        if way == "parts":
            plan: Any = PartPlan(part, dtype)  # type: ignore[arg-type]
            module = PartFiles(kind, folder, find_weights(folder), plan).load(torch.device("cpu"))
        else:
            module = kind.from_pretrained(folder, **options)
        seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "seconds": seconds,
                "size": weights_bytes([module]),
                "peak": peak.most - before.rss,
                "anonymous": peak.anonymous - (before.rss - before.shared),
            }
        )
    )


def child(*words: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads((done.stdout or "{}").splitlines()[-1])
    return found


def ways_of(part: str, shards: int) -> list[str]:
    """The ways that differ for this part."""
    if part.startswith("text"):
        return ["parts", "plain", "read", "serial"]
    return ["parts", "plain", "read", *(["parallel"] if shards > 1 else [])]


def measure(part: str, case: str, rounds: int, scratch: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        child("--write", part, "--case", case, "--folder", str(folder))
        files = sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways_of(part, len(files))}
        for _ in range(rounds):
            for way, found in runs.items():
                words = ("--load", part, "--case", case, "--folder", str(folder), "--way", way)
                found.append(child(*words, **WAYS[way]))
                print(way, found[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    report(part, case, files, runs)


def report(part: str, case: str, files: list[int], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Rows on memory and seconds. files: their sizes in bytes, the largest last."""
    import ledger

    size = runs["parts"][0]["size"]
    about = f"{part}, {CASES[case][0]} to {CASES[case][1]}, {size / GIB:.2f} GiB, files: {len(files)}"
    about = f"{about.replace('torch.', '')}, largest {files[-1] / GIB:.2f}"
    for name, kind in (("extra", "peak"), ("anonymous", "anonymous")):
        extra = {way: max(0, *(run[kind] - size for run in found)) / GIB for way, found in runs.items()}
        others = ", ".join(f"{way} {gib:.2f}" for way, gib in extra.items() if way != "parts")
        rounds = len(runs["parts"])
        ledger.record(
            f"load_host_{name}_gib.{part}.{case}", extra["parts"], "GiB", n=rounds, notes=f"{about}; {others}"
        )
    seconds = {way: [run["seconds"] for run in found] for way, found in runs.items()}
    own = seconds["parts"]
    ratios = {
        way: statistics.median(ours / theirs for ours, theirs in zip(own, found, strict=True))
        for way, found in seconds.items()
        if way != "parts"
    }
    over = ", ".join(f"{way} {ratio:.2f}" for way, ratio in ratios.items())
    ledger.record(
        f"load_s_per_gib.{part}.{case}",
        statistics.median(own) / (size / GIB),
        "s/GiB",
        spread=f"{min(own):.2f}-{max(own):.2f} s",
        n=len(own),
        notes=f"{about}; over other ways, in turns: {over}; load {os.getloadavg()[1]:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", choices=PARTS)
    parser.add_argument("--load", choices=PARTS)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--case", choices=CASES, default="cast")
    parser.add_argument("--way", choices=WAYS, default="parts")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    if args.write:
        write(args.write, CASES[args.case][0], args.folder)
        return
    if args.load:
        load_once(args.load, args.folder, args.way, CASES[args.case][1])
        return
    measure(args.part, args.case, args.rounds, args.scratch)


if __name__ == "__main__":
    main()
