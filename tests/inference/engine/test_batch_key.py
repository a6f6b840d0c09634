"""The fast path to a batch key gives the key that the slow path gives, whatever a fiber called before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.batch_key import DigestCache
from deployments.engine.call import ModuleCall, Seam, make_call
from deployments.engine.call_signature import KeyCache
from tests.inference.engine.module_cases import glm_caches
from tests.inference.engine.test_call import call, rows, seam

# by argument: how to make its values for a batch size; every role, and values that differ in one respect each
VALUES: dict[str, tuple[Callable[[int], Any], ...]] = {
    "hidden_states": (
        lambda b: rows(b, 4),
        lambda b: rows(b, 4, value=1.0),
        lambda b: rows(b, 5),
        lambda b: rows(b, 4).double(),
        lambda b: rows(b, 4, 1),
    ),
    "encoder_hidden_states": (
        lambda b: rows(b, 3),
        lambda b: rows(b, 3, value=1.0),
        lambda b: rows(b, 2),
        lambda b: rows(b, 3).double(),
        lambda _b: None,
    ),
    "guidance": (lambda b: rows(b), lambda b: rows(b, value=3.5), lambda _b: None, lambda b: rows(b + 1)),
    "down_block_additional_residuals": (
        lambda b: [rows(b, 2), rows(b, 3)],
        lambda b: [rows(b, 2, value=1.0), rows(b, 3)],
        lambda b: [rows(b, 2), rows(b, 4)],
        lambda b: [rows(b, 2)],
        lambda b: (rows(b, 2), rows(b, 3)),
    ),
    "added_cond_kwargs": (
        lambda b: {"text_embeds": rows(b, 2), "time_ids": rows(b, 6)},
        lambda b: {"text_embeds": rows(b, 2), "time_ids": rows(b, 5)},
        lambda b: {"text_embeds": rows(b, 2), "time_ids": None},
        lambda b: {"text_embeds": rows(b, 2)},
        lambda _b: {},
    ),
    "encoder_hidden_states_llama3": (
        lambda b: rows(3, b, 2),
        lambda b: rows(4, b, 2),
        lambda b: rows(3, b, 2, value=1.0),
    ),
    "cap_feats": (
        lambda b: [rows(5, 2)] * b,
        lambda b: [rows(5 + i, 2) for i in range(b)],
        lambda b: [rows(5, 2)] * (b + 1),
    ),
    "img_shapes": (
        lambda b: [[(1, 4, 6)]] * b,
        lambda b: [[(1, 6, 4)]] * b,
        lambda _b: [[(1, 4, 6)], [(1, 6, 4)]],
    ),
    "siglip_feats": (
        lambda b: [[rows(2, 2), None]] * b,
        lambda b: [[rows(2, 2), rows(2, 2)]] * b,
        lambda b: [[rows(2, 3), None]] * b,
        lambda b: [None] * b,
    ),
    "image_noise_mask": (lambda b: [[0, 1]] * b, lambda b: [[1, 1]] * b, lambda _b: [[0, 1]]),
    "id_cond": (lambda b: rows(b, 2), lambda _b: rows(1, 2), lambda b: rows(b + 1, 2), lambda b: rows(b, 3)),
    "img_mask": (
        lambda b: torch.tensor([[True, False]] * b),
        lambda b: torch.tensor([[False, True]] * b),
        lambda b: torch.tensor([[True, False], [False, True]] * b)[:b],
        lambda _b: torch.tensor([[True, False]]),
    ),
    "kv_caches": (lambda _b: glm_caches(None), lambda _b: glm_caches("skip"), lambda _b: glm_caches("read")),
    "timestep": (
        lambda _b: torch.tensor(1.0),
        lambda _b: torch.tensor(2),
        lambda _b: torch.tensor([1.0]),
        lambda b: rows(b),
        lambda b: rows(b, 7),
        lambda _b: 1.0,
    ),
    "img_ids": (
        lambda _b: torch.tensor([[0.0, 1.0]]),
        lambda _b: torch.tensor([[1.0, 0.0]]),
        lambda _b: torch.tensor([[0, 1]]),
        lambda _b: torch.tensor([0.0, 1.0]),
        lambda _b: None,
    ),
    "visual_rope_pos": (
        lambda _b: [torch.arange(3)],
        lambda _b: [torch.arange(1, 4)],
        lambda _b: (torch.arange(3),),
    ),
    "attention_kwargs": (
        lambda _b: {},
        lambda _b: {"scale": 1.0},
        lambda _b: {"scale": 0.5},
        lambda _b: {"mask": torch.zeros(1)},
        lambda _b: None,
    ),
    "conditioning_scale": (
        lambda _b: 1.0,
        lambda _b: 0.5,
        lambda _b: 1,
        lambda _b: True,
        lambda _b: "1.0",
        lambda _b: float("nan"),
        lambda _b: None,
        lambda _b: [1.0, 0.5],
        lambda _b: torch.tensor(1.0),
    ),
    "use_cache": (lambda _b: False, lambda _b: True),
}
ABSENT = -1


@st.composite
def fibers(draw: st.DrawFn) -> list[tuple[dict[str, int], int, frozenset[str]]]:
    """A fiber's calls: which value each argument has, the batch size, and which arguments are new objects.

    Every call differs from the one before in at most one of up to four arguments.
    """
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4, unique=True))
    chosen = dict.fromkeys(VALUES, ABSENT) | {"hidden_states": 0} | dict.fromkeys(names, 0)
    calls = []
    for _ in range(draw(st.integers(2, 6))):
        name = draw(st.sampled_from(names))
        chosen = chosen | {name: draw(st.integers(ABSENT, len(VALUES[name]) - 1))}
        new = draw(st.frozensets(st.sampled_from(names), max_size=2))
        calls.append((chosen, draw(st.sampled_from([1, 1, 1, 2])), new))
    return calls


class Arguments:
    """Makes the arguments of a fiber's calls: the same object for the same value, or a new one."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int], Any] = {}

    def of(self, chosen: dict[str, int], batch_size: int, new: frozenset[str]) -> dict[str, Any]:
        return {
            name: self._value(name, index, batch_size, name in new)
            for name, index in chosen.items()
            if index != ABSENT
        }

    def _value(self, name: str, index: int, batch_size: int, new: bool) -> Any:
        variant = (name, index, batch_size)
        if new or variant not in self._made:
            self._made[variant] = VALUES[name][index](batch_size)
        return self._made[variant]


@settings(max_examples=300)
@given(fibers())
def test_the_fast_path_gives_the_key_of_the_slow_path(
    calls: list[tuple[dict[str, int], int, frozenset[str]]],
) -> None:
    where, cache, arguments = seam("Transformer", "guidance"), KeyCache(), Arguments()
    keys: list[object] = []  # held, because a seam knows the keys that are alive

    for chosen, batch_size, new in calls:
        named = arguments.of(chosen, batch_size, new)
        fast = make_call(where, cache, (), dict(named))
        slow = make_call(where, KeyCache(), (), dict(named))

        assert fast.key is slow.key
        assert fast.batch_size == slow.batch_size
        keys.append(fast.key)


def sequence(where: Seam, *calls: dict[str, Any]) -> list[ModuleCall]:
    """One fiber's calls, each with a batch of one row of new hidden states beside what is given."""
    cache = KeyCache()
    return [call(where, cache, **{"hidden_states": rows(1, 4), **arguments}) for arguments in calls]


def test_a_tensor_is_read_once_while_it_lives() -> None:
    digests, ids = DigestCache(), torch.arange(4)

    first = digests.digest(ids)
    known = len(digests)
    equal = digests.digest(ids.clone())
    other = digests.digest(ids + 1)
    del ids

    assert first == equal != other
    assert (known, len(digests)) == (1, 0)


def test_a_tensor_that_was_written_to_is_read_again() -> None:
    digests, ids = DigestCache(), torch.arange(4)
    before = digests.digest(ids)

    with torch.inference_mode():
        ids[0] = 7

    assert digests.digest(ids) == digests.digest(torch.tensor([7, 1, 2, 3])) != before


def test_another_shared_tensor_of_equal_shape_and_other_values_has_another_key() -> None:
    where, ids = seam(), torch.tensor([[0.0, 1.0]])

    first, same, equal, other = sequence(
        where, {"img_ids": ids}, {"img_ids": ids}, {"img_ids": ids.clone()}, {"img_ids": ids + 1}
    )

    assert first.key is same.key is equal.key
    assert other.key is not first.key


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_states": rows(1, 5)},
        {"hidden_states": rows(2, 4)},
        {"hidden_states": rows(1, 4).double()},
        {"hidden_states": rows(1, 2, 2)},
    ],
)
def test_a_changing_tensor_of_another_form_is_seen_by_the_fast_path(other: dict[str, Any]) -> None:
    where, ids = seam(), torch.tensor([[0.0, 1.0]])

    first, again, changed = sequence(where, {"img_ids": ids}, {"img_ids": ids}, {"img_ids": ids, **other})
    alone = call(where, **other, img_ids=ids)

    assert first.key is again.key
    assert changed.key is alone.key
    assert changed.batch_size == alone.batch_size == other["hidden_states"].shape[0]
