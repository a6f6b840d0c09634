"""How the arguments of calls are stacked for one forward, and how its output is split among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deployments.engine.stacking import RaggedList, Unsplittable, select_rows, split, stack
from tests.inference.engine.test_call import call, rows, seam


def test_every_kind_of_argument_is_stacked_in_its_own_way() -> None:
    where = seam("HiDreamImageTransformer2DModel")
    calls = [
        call(
            where,
            hidden_states=rows(count, 4, value=count),
            timesteps=torch.tensor(count),
            encoder_hidden_states_llama3=rows(3, count, 2, value=count),
            img_shapes=[[(1, 2, 2)]],
            down_block_additional_residuals=[rows(count, 1, value=count)],
        )
        for count in (1, 2)
    ]

    merged = stack(calls)

    assert merged["hidden_states"].tolist() == [[1.0] * 4, [2.0] * 4, [2.0] * 4]
    assert merged["timesteps"].tolist() == [1.0, 2.0, 2.0]
    assert merged["encoder_hidden_states_llama3"].shape == (3, 3, 2)
    assert merged["encoder_hidden_states_llama3"][0, :, 0].tolist() == [1.0, 2.0, 2.0]
    assert merged["img_shapes"] == [[(1, 2, 2)]] * 3
    assert merged["down_block_additional_residuals"][0].tolist() == [[1.0], [2.0], [2.0]]


def test_lists_with_one_tensor_per_row_are_joined_and_split() -> None:
    where = seam("ZImageTransformer2DModel")
    calls = [
        call(where, x=[rows(4, 1, value=i) for i in group], t=torch.tensor(group), cap_feats=[rows(5, 2)] * 2)
        for group in ([0.0, 1.0], [2.0, 3.0])
    ]

    merged = stack(calls)
    answers = split((RaggedList(merged["x"]),), [2, 2])

    assert calls[0].key is calls[1].key is not None
    assert len(merged["cap_feats"]) == 4
    assert [[float(x[0, 0]) for x in answer[0]] for answer in answers] == [[0.0, 1.0], [2.0, 3.0]]
    with pytest.raises(Unsplittable):
        split(RaggedList(merged["x"]), [2, 3])


def test_what_all_rows_of_a_call_have_in_common_is_repeated_for_each() -> None:
    where = seam("ConsisIDTransformer3DModel")
    calls = [call(where, hidden_states=rows(count, 4), id_cond=rows(1, 2, value=count)) for count in (1, 2)]

    merged = stack(calls)
    selected = select_rows(where, calls[1].arguments, [0, 1, 1])

    assert calls[0].key is calls[1].key is not None
    assert merged["id_cond"].tolist() == [[1.0] * 2, [2.0] * 2, [2.0] * 2]
    assert selected["id_cond"].tolist() == [[2.0] * 2] * 3


def test_rows_that_steer_the_forward_are_stacked_and_shared_by_equal_sets_only() -> None:
    where = seam("QwenImage21Transformer2DModel")
    masks = [torch.tensor([[True, False]]), torch.tensor([[True, False]] * 2), torch.tensor([[False, True]])]

    one, two, other = (call(where, hidden_states=rows(len(mask), 4), img_mask=mask) for mask in masks)

    assert one.key is two.key is not None
    assert other.key not in (None, one.key)
    assert stack([one, two])["img_mask"].tolist() == [[True, False]] * 3
    assert select_rows(where, two.arguments, [1, 0, 0])["img_mask"].tolist() == [[True, False]] * 3


def test_times_of_every_token_are_kept() -> None:
    where = seam()
    calls = [call(where, hidden_states=rows(1, 4), timestep=rows(1, 3, value=i)) for i in (1.0, 2.0)]

    assert stack(calls)["timestep"].tolist() == [[1.0] * 3, [2.0] * 3]


def test_constant_arguments_in_another_order_are_stacked_in_that_order() -> None:
    where, texts = seam(), [rows(1, 3, value=i) for i in (1.0, 2.0)]

    def stacked(order: list[Tensor]) -> list[float]:
        calls = [call(where, hidden_states=rows(1, 4), encoder_hidden_states=text) for text in order]
        return stack(calls)["encoder_hidden_states"][:, 0].tolist()

    assert stacked(texts) == [1.0, 2.0]
    assert stacked(texts[::-1]) == [2.0, 1.0]


def test_constant_arguments_are_stacked_once_and_let_go_with_the_first_of_them() -> None:
    where, texts = seam(), [rows(1, 3, value=i) for i in (1.0, 2.0)]

    def merged() -> dict[str, Any]:
        return stack([call(where, hidden_states=rows(1, 4), encoder_hidden_states=text) for text in texts])

    first, second = merged(), merged()
    texts[1] = rows(1, 3, value=3.0)
    third = merged()

    assert first["encoder_hidden_states"] is second["encoder_hidden_states"]
    assert first["hidden_states"] is not second["hidden_states"]
    assert third["encoder_hidden_states"][:, 0].tolist() == [1.0, 3.0]
    texts.clear()
    assert not where.stacked_constants


@pytest.mark.parametrize(
    ("times", "joined"),
    [
        ([torch.tensor(3), torch.tensor(4)], [3.0, 3.0, 4.0]),
        ([torch.tensor([3.0]), torch.tensor([4.0])], [3.0, 3.0, 4.0]),
        ([torch.tensor([3.0, 3.0]), torch.tensor(4.0)], [3.0, 3.0, 4.0]),
        ([torch.tensor([3, 5]), torch.tensor([4.5])], [3.0, 5.0, 4.5]),
    ],
)
def test_each_row_has_its_time_as_a_float(times: list[Tensor], joined: list[float]) -> None:
    where = seam()
    calls = [call(where, hidden_states=rows(2 - i, 4), timestep=time) for i, time in enumerate(times)]

    merged = stack(calls)["timestep"]

    assert merged.dtype is torch.float32
    assert merged.tolist() == joined


def test_answers_keep_their_layout_in_memory() -> None:
    output = torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last)

    first, second = split((output,), [1, 1])

    assert first[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(second[0], output[1:])
    assert second[0].untyped_storage().nbytes() == 24 * 4
    assert split((), [1, 1]) == [(), ()]


def test_answers_are_copies_and_caches_are_left_out() -> None:
    class DynamicCache:
        pass

    output = {"sample": torch.arange(3.0), "cache": DynamicCache(), 7: None}

    first, second = split(output, [1, 2])

    assert first["sample"].untyped_storage().nbytes() == 4
    assert second["sample"].tolist() == [1.0, 2.0]
    assert first["cache"] is None
    with pytest.raises(Unsplittable):
        split(torch.zeros(2), [1, 2])


def test_rows_are_selected_in_any_order_and_repeatedly() -> None:
    arguments = {
        "hidden_states": torch.arange(3.0),
        "timestep": torch.tensor(5),
        "added_cond_kwargs": {"time_ids": torch.arange(3.0)},
        "img_ids": torch.arange(4),
    }

    chosen = select_rows(seam(), arguments, [2, 0, 0])

    assert (
        chosen["hidden_states"].tolist()
        == chosen["added_cond_kwargs"]["time_ids"].tolist()
        == [2.0, 0.0, 0.0]
    )
    assert chosen["timestep"].tolist() == [5.0, 5.0, 5.0]
    assert chosen["img_ids"] is arguments["img_ids"]


@pytest.mark.parametrize(
    "indices",
    [[0], [2], [0, 1, 2, 3], [0, 1, 2, 3, 3, 3], [1, 1, 1], [3, 1, 2, 0, 0], [1, 1, 2, 3], [0, 1, 1, 2]],
)
def test_selected_rows_are_copies_that_no_list_of_numbers_is_sent_for(indices: list[int]) -> None:
    first = torch.arange(24.0).reshape(4, 3, 2).transpose(1, 2)
    second = torch.arange(24).reshape(2, 4, 3)
    arguments = {
        "hidden_states": first,
        "encoder_hidden_states_llama3": second,
        "timestep": torch.arange(4.0),
    }

    with NoIndexing():
        chosen = select_rows(seam(), arguments, indices)

    assert torch.equal(chosen["hidden_states"], first[indices])
    assert torch.equal(chosen["encoder_hidden_states_llama3"], second[:, indices])
    assert chosen["timestep"].tolist() == [float(index) for index in indices]
    assert chosen["hidden_states"].data_ptr() != first.data_ptr()
    assert chosen["hidden_states"].is_contiguous() or len(set(indices)) == 1


class NoIndexing(TorchFunctionMode):
    """Fails at an index that is a list or a tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not Tensor.__getitem__, args[1]
        return function(*args, **(kwargs or {}))
