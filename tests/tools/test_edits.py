"""Pairs of drawings for the editing model: what is said is what changes, and the scorer sees both."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from random import Random

import pytest

from tools.tiny_models.edit_score import TOKENS, accuracy, held_out, shows_edit
from tools.tiny_models.edits import KIND_WEIGHTS, Edit, draw_edit, edit_words, instruction, is_held_out
from tools.tiny_models.scenes import Scene, Thing, render
from tools.tiny_models.vocabulary import t5_tokenizer

EDITS = [draw_edit(seed) for seed in range(60)]


def test_true_renderings_score_100_per_cent_and_unedited_ones_none() -> None:
    _, edits = zip(*islice(held_out(), 30), strict=True)

    kinds = dict.fromkeys([edit.kind for edit in edits] + ["all"], 0.0)
    after = accuracy([render(edit.after) for edit in edits], list(edits))
    before = accuracy([render(edit.before) for edit in edits], list(edits))

    assert after == dict.fromkeys(kinds, 100.0)
    assert before == kinds
    assert set(KIND_WEIGHTS) < set(kinds)


@pytest.mark.parametrize("edit", EDITS[:20], ids=lambda edit: edit.kind)
def test_what_is_not_named_stays(edit: Edit) -> None:
    before, after = set(edit.before.things), set(edit.after.things)
    background_stays = edit.before.background == edit.after.background

    assert len(before ^ after) + (not background_stays) in (1, 2)
    assert background_stays == (edit.kind != "background")


def test_an_edit_is_a_function_of_its_seed() -> None:
    assert [draw_edit(seed) for seed in range(60)] == EDITS


def test_no_combination_is_both_trained_and_held_out() -> None:
    held = [draw_edit(seed, held_out=True) for seed in range(60)]

    assert all(is_held_out(edit) for edit in held)
    assert not any(is_held_out(edit) for edit in EDITS)


def test_instructions_fit_into_the_tokens_that_training_uses() -> None:
    tokenizer, random = t5_tokenizer(edit_words(2_000)), Random(1)

    lengths = [len(tokenizer(instruction(edit, random)).input_ids) for edit in EDITS]

    assert max(lengths) <= TOKENS


def test_an_added_object_may_be_anywhere_on_the_free_side_and_nowhere_else() -> None:
    adding = [edit for edit in (draw_edit(seed) for seed in range(400)) if edit.kind == "add"]
    assert len(adding) > 20

    for edit in adding:
        other, new = edit.before.things[0], edit.thing
        moved = replace(new, x=new.x + 0.03, y=new.y - 0.03, side=new.side * 0.9)
        mirrored = replace(new, x=2 * other.x - new.x, y=2 * other.y - new.y)
        assert shows_edit(render(_with(edit, new)), edit)
        assert shows_edit(render(_with(edit, moved)), edit)
        assert not shows_edit(render(_with(edit, mirrored)), edit)
        assert not shows_edit(render(edit.before), edit)


def _with(edit: Edit, new: Thing) -> Scene:
    """The drawing after the edit with another new object."""
    things = [*edit.after.things]
    things[edit.index] = new
    return replace(edit.after, things=tuple(things))
