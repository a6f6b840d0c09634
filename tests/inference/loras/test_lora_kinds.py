"""LoHa, LoKr, DoRA and Tucker factors in mixed batches, against the arithmetic of LyCORIS and of peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGMLQuantizationType, quants
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save
from torch import Tensor, nn

from deployments.loras.rescale import rescales
from deployments.loras.source import read_lora
from deployments.models.plain_weights import plain_weight
from tests.inference import tiny
from tests.inference.loras.test_batched_lora import SIZE, LoraEngine, call_of, distance
from tests.inference.models.test_quantise import quantised

TOLERANCE = 1e-5  # of the largest latent, in float32
LORA, LOHA, LOKR = LoConModule, LohaModule, LokrModule


@dataclass(frozen=True)
class Lycoris:
    """An adapter that LyCORIS makes, in kohya's names."""

    kind: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 4
    weight: float = 1.0

    def file(self, pipeline: Any, layers: Callable[[str], bool], seed: int) -> bytes:
        """The file; afterwards the pipeline computes with the adapter, by LyCORIS' own forwards."""
        torch.manual_seed(seed)
        part, prefix = ("unet", "lora_unet") if hasattr(pipeline, "unet") else ("transformer", "lora_unet")
        tensors: dict[str, Tensor] = {}
        for path, layer in list(getattr(pipeline, part).named_modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d) and layers(path):
                name = f"{prefix}_{path.replace('.', '_')}"
                with torch.inference_mode(False), torch.no_grad():
                    module = self.kind(
                        name, layer, multiplier=self.weight, lora_dim=self.rank, alpha=2.0, **self.options
                    )
                    randomise(module, layer)
                module.eval()
                state = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
                state = state or module.state_dict()
                tensors |= {f"{name}.{key}": value.detach().clone() for key, value in state.items()}
                module.apply_to()
        assert tensors, "no layer was named"
        return save({key: value.contiguous() for key, value in tensors.items()})


def randomise(module: nn.Module, layer: nn.Module) -> None:
    """Factors as after a training: none is zero, and the change is a tenth of the weight."""
    for name, one in module.named_parameters():
        if "dora" not in name:
            one.copy_(torch.randn(one.shape) * 0.3)
        else:
            one.mul_(1 + 0.3 * torch.rand(one.shape))
    change = module.get_weight(layer.weight.shape) if hasattr(module, "get_weight") else module.make_weight()
    last = next(
        one for name, one in module.named_parameters() if name.endswith(("w2", "w2_a", "lora_up.weight"))
    )
    last.mul_(0.3 * float(layer.weight.std()) / float(change.std()))


def attention(path: str) -> bool:
    return "attn" in path and ("to_q" in path or "to_v" in path)


def resnets(path: str) -> bool:
    return "resnets.0" in path or "proj_in" in path


LINEAR = {
    "loha": Lycoris(LOHA),
    "loha, half of it": Lycoris(LOHA, weight=0.5),
    "lokr, whole factors": Lycoris(LOKR, {"full_matrix": True, "factor": 4}, weight=-0.6),
    "lokr, a product on the right": Lycoris(LOKR, {"factor": 2}, rank=2),
    "lokr, products on both sides": Lycoris(LOKR, {"factor": 16, "decompose_both": True}, rank=2, weight=0.8),
    "dora": Lycoris(LORA, {"weight_decompose": True}),
    "dora of inputs": Lycoris(LORA, {"weight_decompose": True, "wd_on_out": False}),
    "dora and loha": Lycoris(LOHA, {"weight_decompose": True}),
    "dora and lokr": Lycoris(LOKR, {"weight_decompose": True, "full_matrix": True, "factor": 4}),
    "dora of inputs and lokr": Lycoris(
        LOKR, {"weight_decompose": True, "wd_on_out": False, "full_matrix": True, "factor": 4}
    ),
}
CONVOLUTIONS = {
    "lora with Tucker's core": Lycoris(LORA, {"use_tucker": True}),
    "loha": Lycoris(LOHA),
    "loha with Tucker's cores": Lycoris(LOHA, {"use_tucker": True}),
    "lokr": Lycoris(LOKR, {"factor": 4}, rank=1),
    "lokr with Tucker's core": Lycoris(LOKR, {"factor": 4, "use_tucker": True}, rank=1),
    "lokr, whole factors": Lycoris(LOKR, {"full_matrix": True, "factor": 4}),
    "dora": Lycoris(LORA, {"weight_decompose": True}),
    "dora of inputs": Lycoris(LORA, {"weight_decompose": True, "wd_on_out": False}),
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def check_together(
    make: Callable[[], Any], adapters: Mapping[str, Lycoris], layers: Callable[[str], bool], **arguments: Any
) -> None:
    """All adapters in one batch, with a request without one."""
    wanted, files = [], []
    for seed, adapter in enumerate(adapters.values()):
        reference = make()
        files.append((adapter.file(reference, layers, seed), adapter.weight))
        wanted.append(call_of(reference, seed, num_inference_steps=2, **arguments)())
    wanted.append(call_of(make(), len(files), num_inference_steps=2, **arguments)())
    engine = LoraEngine(make())
    sets = [*(engine.lora_set([file]) for file in files), None]

    answers = engine.together(
        [
            (call_of(engine.pipeline, seed, num_inference_steps=2, **arguments), own)
            for seed, own in enumerate(sets)
        ],
        rows=2 * len(sets),
    )

    assert engine.rows > 1.5 * engine.forwards, "the requests must really share forwards"
    for (name, answer), expected in zip(zip([*adapters, "none"], answers, strict=True), wanted, strict=True):
        assert distance(answer, expected) <= TOLERANCE, name
    plain = call_of(make(), 0, num_inference_steps=2, **arguments)()
    assert distance(answers[0], plain) > 100 * TOLERANCE, "the adapters must change something"


def test_every_kind_for_linear_layers_equals_lycoris_in_one_batch() -> None:
    check_together(tiny.flux, LINEAR, attention, **SIZE, max_sequence_length=48)


def test_every_kind_for_convolutions_equals_lycoris_in_one_batch() -> None:
    check_together(tiny.sd, CONVOLUTIONS, resnets, **SIZE, guidance_scale=5.0)


def peft_files(pipeline: Any, configs: list[Any], weights: list[float]) -> list[tuple[bytes, float]]:
    """One file for each adapter; afterwards the pipeline computes with all of them, by peft's forwards."""
    torch.manual_seed(7)
    with torch.inference_mode(False), torch.no_grad():
        model = peft.get_peft_model(pipeline.transformer, configs[0], adapter_name="a0")
        for number, config in enumerate(configs[1:], 1):
            model.add_adapter(f"a{number}", config)
        files = []
        for number, weight in enumerate(weights):
            own = [
                (name, one)
                for name, one in model.named_parameters()
                if f".a{number}" in name and not one.is_meta
            ]
            for name, one in own:
                if "magnitude" in name:
                    one.mul_(1 + 0.3 * torch.rand(one.shape))
                else:
                    one.copy_(0.1 * torch.randn(one.shape))
            state = peft.get_peft_model_state_dict(model, adapter_name=f"a{number}")
            files.append((save({key: value.clone() for key, value in state.items()}), weight))
            for module in model.modules():
                if f"a{number}" in getattr(module, "scaling", {}):
                    module.scaling[f"a{number}"] *= weight
        model.base_model.set_adapter([f"a{number}" for number in range(len(configs))])
    return files


TARGETS = ["to_q", "to_v"]
PLAIN = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
DORA = peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=TARGETS)
PEFT = {
    "dora": ([DORA], [1.0]),
    "dora, half of it": ([DORA], [0.5]),
    "loha": ([peft.LoHaConfig(r=4, alpha=4, target_modules=TARGETS)], [0.7]),
    "lokr": ([peft.LoKrConfig(r=2, alpha=2, target_modules=TARGETS)], [-1.0]),
    "dora after lora": ([PLAIN, DORA], [0.8, 0.6]),
    "lora after dora": ([DORA, PLAIN], [1.0, -0.5]),
    "dora after dora": ([DORA, DORA], [0.5, 0.5]),
}


def test_what_peft_makes_equals_peft_in_one_batch() -> None:
    arguments = {**SIZE, "max_sequence_length": 48, "num_inference_steps": 2}
    wanted, files = [], []
    for seed, (configs, weights) in enumerate(PEFT.values()):
        reference = tiny.flux()
        files.append(peft_files(reference, configs, weights))
        wanted.append(call_of(reference, seed, **arguments)())
    engine = LoraEngine(tiny.flux())

    answers = engine.together(
        [
            (call_of(engine.pipeline, seed, **arguments), engine.lora_set(own))
            for seed, own in enumerate(files)
        ],
        rows=len(files),
    )

    assert engine.rows > 1.5 * engine.forwards, "the requests must really share forwards"
    for name, answer, expected in zip(PEFT, answers, wanted, strict=True):
        assert distance(answer, expected) <= TOLERANCE, name


def test_half_of_a_dora_of_lycoris_is_half_way_to_it() -> None:
    whole, half = tiny.flux(), tiny.flux()
    adapter = Lycoris(LORA, {"weight_decompose": True})
    file = adapter.file(whole, attention, 1)
    for path, layer in list(half.transformer.named_modules()):
        if isinstance(layer, nn.Linear) and attention(path):
            merged = whole.transformer.get_submodule(path).forward.__self__.get_merged_weight()[0]
            layer.weight.data = torch.lerp(layer.weight.data, merged, 0.5)
    engine = LoraEngine(tiny.flux())
    arguments = {**SIZE, "max_sequence_length": 48, "num_inference_steps": 2}

    answer = engine.together([(call_of(engine.pipeline, 1, **arguments), engine.lora_set([(file, 0.5)]))])[0]

    assert distance(answer, call_of(half, 1, **arguments)()) <= TOLERANCE


def test_neighbours_change_no_bit_of_any_kind() -> None:
    chosen = ("loha", "lokr, a product on the right", "dora", "dora of inputs and lokr")
    engine = LoraEngine(tiny.flux(), deterministic=True)
    files = [LINEAR[name].file(tiny.flux(), attention, seed) for seed, name in enumerate(chosen)]
    sets = [engine.lora_set([(file, 0.7)]) for file in files]
    sets += [engine.lora_set([(files[2], 1.0), (files[1], 0.5)]), None]
    arguments = {**SIZE, "max_sequence_length": 48, "num_inference_steps": 2}
    works = [(call_of(engine.pipeline, seed, **arguments), own) for seed, own in enumerate(sets)]
    alone = [engine.together([work])[0] for work in works]

    together = engine.together(works, rows=8)

    assert engine.rows > 1.5 * engine.forwards
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_a_dora_measures_the_weights_that_a_quantised_layer_stands_for(kind: Any) -> None:
    file = LINEAR["dora"].file(tiny.flux(), attention, 1)
    pipeline, plain = tiny.flux(), tiny.flux()
    quantised(pipeline.transformer, kind, "float32")
    adapter = read_lora(file, pipeline)
    for path, layer in plain.transformer.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = (
                plain_weight(pipeline.transformer.get_submodule(path)).float().view_as(layer.weight)
            )

    own, expected = (
        rescales(adapter.magnitudes, adapter.factors, {"transformer": one.transformer}, plain_weight)
        for one in (pipeline, plain)
    )

    assert own.keys() == adapter.magnitudes.keys() != set()
    for key in own:
        torch.testing.assert_close(own[key].factor(0.5), expected[key].factor(0.5))
    assert not torch.equal(own[key].own, torch.zeros_like(own[key].own))


def test_the_weight_of_a_gguf_layer_is_what_its_forward_multiplies_with() -> None:
    stored = quants.quantize(torch.randn(8, 64).numpy(), GGMLQuantizationType.Q8_0)
    layer = GGUFLinear(64, 8, bias=False, compute_dtype=torch.float32)
    layer.weight = GGUFParameter(torch.from_numpy(stored), quant_type=GGMLQuantizationType.Q8_0)

    weight = plain_weight(layer).float()

    torch.testing.assert_close(layer(torch.eye(64)).t(), weight)
    assert weight.shape == (8, 64)
