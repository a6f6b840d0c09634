"""What is said to be cut of a prompt is what the pipeline does not read, in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.pipelines.truncation import TokenizedText, cut_texts, watch_tokenizers
from tests.inference import tiny
from tests.inference.families import FAMILIES, Family

LENGTHS = {"Qwen-Image": 240, "Ovis-Image": 240}  # a token is a letter, also of their templates
LONG = " ".join(f"{letter * 3} {letter * 2}" for letter in "abcdefghijklmnopqrstuvwxyz" * 4)


def result(name: str, pipeline: Any, tokenized: list[TokenizedText] | None = None, **changes: Any) -> Tensor:
    """One step of the family's first request, changed."""
    family = FAMILIES[name]
    own = copy.copy(pipeline)
    vars(own)["scheduler"] = copy.deepcopy(pipeline.scheduler)
    own.set_progress_bar_config(disable=True)
    request = {**family.requests()[0], "num_inference_steps": 1, **changes}
    if "max_sequence_length" in family.common:
        request["max_sequence_length"] = LENGTHS.get(name, 64)
    if tokenized is not None:
        watch_tokenizers(own, request.get("max_sequence_length"), tokenized.append)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        output: Tensor = getattr(own(**request, generator=generator, output_type="latent"), family.output)
    return output


def built(family: Family) -> Any:
    torch.manual_seed(0)
    pipeline = family.build().to(dtype=family.dtype)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def clip_alone(one: TokenizedText) -> str | None:
    """What would be said of this encoder if it were the model's only one."""
    return cut_texts([one], {"prompt": LONG}).get("prompt")


def cut_of(message: str) -> str:
    return message.rpartition(': "')[2].removesuffix('"')


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_reported_changes_nothing_and_the_word_before_does(name: str) -> None:
    pipeline, tokenized, none = built(FAMILIES[name]), list[TokenizedText](), list[TokenizedText]()

    whole = result(name, pipeline, prompt=LONG)
    watched = result(name, pipeline, tokenized, prompt=LONG)
    result(name, pipeline, none, prompt="a cat")

    assert torch.equal(watched, whole), "watching changes nothing"
    assert cut_texts(none, {"prompt": "a cat"}) == {}
    (message,) = cut_texts(tokenized, {"prompt": LONG}).values()
    cut = cut_of(message)
    assert LONG.endswith(cut)
    read = LONG.removesuffix(cut)
    assert not torch.equal(result(name, pipeline, prompt=read.rstrip()[:-1] + "!" + cut), whole)
    of_clip = [cut_of(message) for message in map(clip_alone, tokenized) if message]
    unread = min([cut, *of_clip], key=len)
    changed = LONG.removesuffix(unread) + unread[::-1]
    assert torch.equal(result(name, pipeline, prompt=changed), whole)


def test_negative_prompts_are_reported_for_themselves() -> None:
    tokenized, texts = list[TokenizedText](), {"prompt": "a cat", "negative_prompt": LONG}

    result("SDXL", built(FAMILIES["SDXL"]), tokenized, **texts, guidance_scale=5.0)

    cut = cut_texts(tokenized, texts)
    assert list(cut) == ["negative_prompt"]
    assert "text_encoder and text_encoder_2 read 75 of" in cut["negative_prompt"]


def test_clip_beside_an_encoder_that_reads_all_of_the_prompt_is_no_loss() -> None:
    pipeline = tiny.flux()
    prompt, tokenized = "a fox " * 30, list[TokenizedText]()
    watch_tokenizers(pipeline, None, tokenized.append)

    pipeline.encode_prompt(prompt, prompt_2=None, max_sequence_length=512)

    assert [one.encoder for one in tokenized if one.unread] == ["text_encoder"]
    assert cut_texts(tokenized, {"prompt": prompt}) == {}


def test_a_tokenizer_without_offsets_reports_the_same() -> None:
    tokenized: dict[bool, list[TokenizedText]] = {True: [], False: []}
    for is_fast, noted in tokenized.items():
        pipeline = tiny.sd()
        watch_tokenizers(pipeline, None, noted.append)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(pipeline.tokenizer), "is_fast", is_fast)
            pipeline.encode_prompt(LONG, "cpu", 1, do_classifier_free_guidance=False)

    assert tokenized[True] == tokenized[False]
    assert len(tokenized[True]) == 1


def test_a_text_of_the_template_that_is_cut_is_no_loss() -> None:
    text = "Describe: a cat. <end of the prompt>"
    one = TokenizedText("text_encoder", False, text, 20, 24, (text.index("<end"), len(text)))

    assert cut_texts([one], {"prompt": "a cat."}) == {}
    assert "prompt" in cut_texts([one], {"prompt": "a cat. <end"})
