"""Which calls may share a forward: the batch key, and the fast path to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.engine.call import ModuleCall, Seam, make_call
from deployments.engine.call_signature import KeyCache


def seam(module: str = "Transformer", *optional: str) -> Seam:
    return Seam(
        f"{module}.forward", lambda **arguments: arguments, ("hidden_states",), True, frozenset(optional)
    )


def call(where: Seam, cache: KeyCache | None = None, **arguments: Any) -> ModuleCall:
    """By a fiber that has this cache; without one, by a fiber that has made no call before."""
    return make_call(where, cache or KeyCache(), (), arguments)


def rows(count: int, *shape: int, value: float = 0.0) -> Tensor:
    """(count, *shape) of float32, all of this value."""
    return torch.full((count, *shape), value, dtype=torch.float32)


def test_a_key_is_one_object_for_equal_calls() -> None:
    where = seam()

    first, second = call(where, hidden_states=rows(1, 4)), call(where, hidden_states=rows(2, 4))

    assert first.key is second.key
    assert (first.batch_size, second.batch_size) == (1, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"hidden_states": rows(1, 4)}, {"hidden_states": rows(1, 5)}),
        ({"hidden_states": rows(1, 4)}, {"hidden_states": rows(1, 4).double()}),
        ({"img_ids": torch.tensor([[0, 1]])}, {"img_ids": torch.tensor([[1, 0]])}),
        ({"visual_rope_pos": [torch.arange(3)]}, {"visual_rope_pos": [torch.arange(1, 4)]}),
        ({"img_shapes": [[(1, 4, 6)]]}, {"img_shapes": [[(1, 6, 4)]]}),
        ({"timestep": torch.zeros(1)}, {"timestep": torch.zeros(1, 4)}),
        ({"conditioning_scale": 1.0}, {"conditioning_scale": 0.5}),
        ({"attention_kwargs": {"scale": 1.0}}, {"attention_kwargs": None}),
    ],
)
def test_calls_that_differ_in_what_a_batch_shares_have_different_keys(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    where, common = seam(), {"hidden_states": rows(1, 4)}

    assert call(where, **(common | one)).key is not call(where, **(common | other)).key


@pytest.mark.parametrize(
    "strange",
    [
        {"not_listed": torch.zeros(1)},
        {"attention_kwargs": {"mask": torch.zeros(1)}},
        {"guidance": torch.zeros(3)},
        {"img_shapes": [[(1, 4, 4)], [(1, 6, 6)]]},
        {"past_key_values": object()},
        {"use_cache": True},
    ],
)
def test_a_call_with_unknown_arguments_has_no_key(strange: dict[str, Any]) -> None:
    assert call(seam(), hidden_states=rows(1, 4), **strange).key is None


def test_a_timestep_per_token_of_one_row_does_not_serve_two_rows() -> None:
    assert call(seam(), hidden_states=rows(2, 4), timestep=rows(1, 3)).key is None


def test_none_equals_a_missing_argument_only_where_it_is_the_default() -> None:
    where = seam("Transformer", "guidance")
    plain = call(where, hidden_states=rows(1, 4))

    assert call(where, hidden_states=rows(1, 4), guidance=None).key is plain.key
    assert call(where, hidden_states=rows(1, 4), return_dict=None).key is not plain.key


def test_a_fibers_next_call_keeps_its_key_while_nothing_that_counts_changes() -> None:
    where, cache, text, ids = seam(), KeyCache(), rows(1, 3), torch.arange(4)
    arguments = {"encoder_hidden_states": text, "img_ids": ids, "attention_kwargs": {}}

    keys = [
        call(
            where, cache, hidden_states=rows(1, 4, value=i), timestep=torch.tensor(float(i)), **arguments
        ).key
        for i in range(3)
    ]
    resized = call(where, cache, hidden_states=rows(1, 5), timestep=torch.tensor(3.0), **arguments).key
    moved = call(
        where,
        cache,
        hidden_states=rows(1, 4),
        timestep=torch.tensor(4.0),
        **(arguments | {"img_ids": ids + 1}),
    ).key

    assert keys[0] is keys[1] is keys[2]
    assert len({keys[0], resized, moved}) == 3


def test_guided_and_unguided_calls_in_turns_keep_one_key_and_hold_both_texts() -> None:
    where, cache, texts = seam(), KeyCache(), [rows(1, 3, value=i) for i in (1.0, 2.0)]

    keys = [
        call(where, cache, hidden_states=rows(1, 4), encoder_hidden_states=texts[i % 2], scale=0.5).key
        for i in range(6)
    ]

    assert len(set(keys)) == 1
    assert {
        id(held)
        for signature in cache.signatures[where]
        for held in signature.objects
        if isinstance(held, Tensor)
    } == {id(text) for text in texts}


@pytest.mark.parametrize(
    "other",
    [
        {"encoder_hidden_states": rows(1, 3), "scale": 0.25},
        {"encoder_hidden_states": rows(1, 2), "scale": 0.5},
        {"encoder_hidden_states": rows(1, 3), "strength": 0.5},
        {"encoder_hidden_states": None, "scale": 0.5},
        {"encoder_hidden_states": rows(1, 3), "scale": torch.tensor(0.5)},
        {"encoder_hidden_states": rows(1, 3), "scale": 0.5, "strength": 0.5},
    ],
)
def test_a_fibers_next_call_with_something_else_has_another_key(other: dict[str, Any]) -> None:
    where, cache = seam(), KeyCache()

    before = call(where, cache, hidden_states=rows(1, 4), encoder_hidden_states=rows(1, 3), scale=0.5).key

    assert call(where, cache, hidden_states=rows(1, 4), **other).key is not before


def test_a_dict_that_changed_inside_is_seen() -> None:
    where, cache, options = seam(), KeyCache(), {"scale": 1.0}
    before = call(where, cache, hidden_states=rows(1, 4), attention_kwargs=options).key

    options["scale"] = 2.0

    assert call(where, cache, hidden_states=rows(1, 4), attention_kwargs=options).key is not before
