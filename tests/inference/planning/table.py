"""The table of plans in docs/machines.md: `python -m tests.inference.planning.table` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deployments.planning.gpus import GPUS
from deployments.planning.plan import plan_of
from deployments.planning.summary import summary
from tests.inference.planning.published_cards import CARDS, card_of

PAGE = Path(__file__).parents[3] / "docs/machines.md"
BEGIN, END = "<!-- plans: begin -->\n", "<!-- plans: end -->\n"
BESIDE = {  # what may be loaded beside a model, by its id
    "sdxl-base-1.0": ["sdxl-refiner-1.0"],
    "stable-diffusion-v1.5": ["dreamshaper-8", "realistic-vision-v6"],
}
OTHERS = {other for others in BESIDE.values() for other in others}
MODELS = {  # of the table: cards for GPUs
    name: BESIDE.get(name, []) for name, card in CARDS.items() if card.serving.num_gpus and name not in OTHERS
}


def table() -> str:
    """A section for each model, a line for each GPU."""
    return BEGIN + "\n" + "\n".join(_lines()) + "\n\n" + END


def _lines() -> Iterator[str]:
    for number, (name, others) in enumerate(MODELS.items()):
        if number:
            yield ""
        with_others = f" (with {', '.join(others)})" if others else ""
        yield f"**{name}**{with_others}\n"
        yield "| GPU | plan |\n| --- | --- |"
        for gpu in GPUS.values():
            plan = plan_of(card_of(name), gpu.machine(), [CARDS[other] for other in others])
            yield f"| {gpu.name} | {summary(plan)} |"


def written(page: str) -> str:
    """The table as the page has it."""
    return page[page.index(BEGIN) : page.index(END) + len(END)]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(written(text), table()), encoding="utf-8")
