"""One training state: weights, optimisers, running average and step; data-parallel and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MUON_RATE, ADAM_RATE = 2e-3, 1e-3
AVERAGE_DECAY = 0.998


class Learner:
    """Trains the given modules: Muon for the matrices of transformer blocks, AdamW for everything else.

    Every process of the default group holds one; gradients are averaged, so all hold the same weights.
    """

    def __init__(self, modules: dict[str, nn.Module], *, average_decay: float = AVERAGE_DECAY) -> None:
        self.weights = {
            f"{prefix}.{name}": weight
            for prefix, module in modules.items()
            for name, weight in module.named_parameters()
            if weight.requires_grad
        }
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.average_decay = average_decay
        self.steps_done = 0
        in_blocks = [name for name in self.weights if name.startswith("transformer.") and "blocks" in name]
        matrices = {name for name in in_blocks if self.weights[name].ndim == 2}
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            muon = torch.optim.Muon(
                [self.weights[name] for name in self.weights if name in matrices],
                lr=MUON_RATE,
                weight_decay=0.02,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimisers.append((muon, MUON_RATE))
        others = [weight for name, weight in self.weights.items() if name not in matrices]
        adam = torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.optimisers.append((adam, ADAM_RATE))

    def learn(self, loss: Tensor, rate: float) -> float:
        """One step down the loss, learning rates scaled by `rate`; gives back the loss over all processes."""
        loss.backward()
        mean_loss = self._average_gradients(loss.item())
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for optimiser, full_rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = full_rate * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps_done += 1
        with torch.no_grad():  # a short memory at first, so that the start is soon forgotten
            decay = min(self.average_decay, (self.steps_done + 1) / (self.steps_done + 15))
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        return mean_loss

    def _average_gradients(self, loss: float) -> float:
        if not dist.is_initialized():
            return loss
        for weight in self.weights.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients] + [torch.tensor([loss])])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        return flat[-1].item()

    def save(self, path: Path) -> None:
        """Write everything that resuming needs; the old file stays until the new one is whole."""
        tensors = {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        numbers: dict[str, float] = {}  # what an optimiser keeps that is no tensor
        for index, (optimiser, _) in enumerate(self.optimisers):
            for weight, kept in optimiser.state_dict()["state"].items():
                for name, value in kept.items():
                    key = f"optimisers.{index}.{weight}.{name}"
                    if isinstance(value, Tensor):
                        tensors[key] = value
                    else:
                        numbers[key] = value
        metadata = {"steps_done": json.dumps(self.steps_done), "numbers": json.dumps(numbers)}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
        unfinished.rename(path)

    def resume(self, path: Path) -> bool:
        """Continue from a checkpoint of the same modules; False if there is none."""
        if not path.exists():
            return False
        kept: list[dict[int, dict[str, Any]]] = [{} for _ in self.optimisers]
        with safe_open(path, framework="pt") as state:
            values: dict[str, Any] = json.loads(state.metadata()["numbers"])
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(state.get_tensor(f"weights.{name}"))
                    self.average[name].copy_(state.get_tensor(f"average.{name}"))
            names = state.keys()  # safe_open is no mapping
            values |= {key: state.get_tensor(key) for key in names if key.startswith("optimisers.")}
            self.steps_done = json.loads(state.metadata()["steps_done"])
        for key, value in values.items():
            _, index, weight_index, name = key.split(".", 3)
            kept[int(index)].setdefault(int(weight_index), {})[name] = value
        for (optimiser, _), moments in zip(self.optimisers, kept, strict=True):
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": moments, "param_groups": groups})
        return True

    def load_average(self) -> None:
        """Put the running average into the modules: the weights that are shipped."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.average[name])


def learning_rate(step: int, steps: int, *, warm_up: int = 50, cool_down: float = 0.4) -> float:
    """Share of the full rate: a short rise, a plateau, then a straight fall to 0 over the last steps.

    On the plateau `steps` may still be changed without any loss: the past does not depend on it.
    """
    left = (steps - step) / (steps * cool_down)
    return max(0.003, min(1.0, (step + 1) / warm_up, left))


def load_average(checkpoint: Path, **modules: nn.Module) -> None:
    """Put a checkpoint's running average into these modules, which were trained under the same names."""
    with safe_open(checkpoint, framework="pt") as state, torch.no_grad():
        for prefix, module in modules.items():
            for name, weight in module.named_parameters():
                weight.copy_(state.get_tensor(f"average.{prefix}.{name}"))
