"""Switches of torch and cuBLAS that keep the sums of a kernel in one order, set before anything is proven."""

from __future__ import annotations

import os

import torch

# two workspaces of fixed size: with several streams, cuBLAS may otherwise choose another kernel for each
CUBLAS_WORKSPACE = ":4096:8"


def set_determinism_flags() -> None:
    """For this process, without effect on a CPU. Call it before CUDA starts: cuBLAS reads its workspace
    setting when it makes its first handle. A setting of the environment is kept.

    Batch sizes are proven by comparing bits, so a kernel whose result changes from run to run, or which
    autotuning replaces after the proof, would make a proof worthless. Partial sums in 16 bits are off because
    split-K kernels, which small batches get, would round them where large batches do not.

    Not torch.use_deterministic_algorithms: it raises in the middle of a request where a pipeline uses an
    operator that has only another kind of kernel, although the proof finds out whether that matters, and it
    fills every new tensor with NaN.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
