"""`<lora:name:weight>` in prompts (pure)."""

from __future__ import annotations

import time

import pytest

from deployments.protocol.errors import BadRequest
from serve_app.loras.spec import extract_lora_tags


@pytest.mark.parametrize(
    ("prompt", "bare", "asked"),
    [
        ("a fox <lora:ink:0.8>", "a fox", [("ink", 0.8)]),
        ("<lora:ink:0.8> a fox", "a fox", [("ink", 0.8)]),
        ("a fox <lora:ink:-1>, calm", "a fox, calm", [("ink", -1.0)]),
        ("a <LoRA:My Ink v2:1.5> fox", "a fox", [("My Ink v2", 1.5)]),
        ("a fox<lora:ink>", "a fox", [("ink", 1.0)]),
        ("a fox <lora:ink:0.5:0.5>", "a fox", [("ink", 0.5)]),
        ("<lora:a:1><lora:b:2>", "", [("a", 1.0), ("b", 2.0)]),
        ("a fox  with <b>two</b>  spaces", "a fox  with <b>two</b>  spaces", []),
        ("lora:ink:0.8", "lora:ink:0.8", []),
    ],
)
def test_tags_leave_the_prompt_and_become_specs(
    prompt: str, bare: str, asked: list[tuple[str, float]]
) -> None:
    left, specs = extract_lora_tags(prompt)

    assert left == bare
    assert [(spec.reference, spec.weight) for spec in specs] == asked


@pytest.mark.parametrize(
    "tag",
    ["<lora:>", "<lora:ink:>", "<lora:ink:x>", "<lora:ink:3>", "<lora:ink:nan>", "<lora:ink:1:0.5>",
     "<lora:ink:inf>", "<lora:ink:1:1:1>"],
)  # fmt: skip
def test_an_ambiguous_tag_is_refused(tag: str) -> None:
    with pytest.raises(BadRequest) as refused:
        extract_lora_tags(f"a fox {tag}")

    assert refused.value.param == "prompt"


@pytest.mark.parametrize("filler", [" ", "\t", "<lora:", "<lora:a", ">", ":"])
def test_a_prompt_of_one_repeated_part_is_read_in_linear_time(filler: str):
    def cpu_s(repeats: int) -> float:
        began = time.process_time()
        extract_lora_tags("<lora:night:1>" + filler * repeats)
        return time.process_time() - began

    short = min(cpu_s(8_000) for _ in range(3))

    assert cpu_s(32_000) < 8 * max(short, 0.01)  # 16 times as long if it were quadratic
