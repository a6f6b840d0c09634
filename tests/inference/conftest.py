"""One torch thread: on a shared machine OpenMP's spinning threads make the suite 20x slower."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
