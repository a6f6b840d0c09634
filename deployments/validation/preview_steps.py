"""At which denoising steps a request has its previews (pure)."""

from __future__ import annotations


def preview_steps(steps: int, previews: int) -> list[int]:
    """The steps after which `previews` previews come, evenly spread over so many steps: of 4 steps, two come
    after 1 and 3. The last step has none, because the result follows; fewer steps have fewer previews.
    """
    count = min(previews, steps - 1)
    return [(2 * i * steps + count + 1) // (2 * (count + 1)) for i in range(1, count + 1)]
