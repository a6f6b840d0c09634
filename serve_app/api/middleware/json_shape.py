"""How deeply a JSON body nests and how many values it holds, checked before it is parsed."""

import re

from deployments.protocol.errors import BadRequest

MAX_JSON_PARTS = 10_000  # brackets and commas; 32 MiB of "[],[]," would become a gigabyte of lists
# One whole string (or the rest of the body, if it never ends) is one match: linear for any input.
JSON_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)


def check_json_shape(body: bytes, max_depth: int) -> None:
    """Raises BadRequest when brackets nest deeper than max_depth, or when there are far too many values."""
    depth = 0
    for count, match in enumerate(JSON_PART.finditer(body)):
        part = match[0]
        if part in (b"[", b"{"):
            depth += 1
            if depth > max_depth:
                raise BadRequest(f"the JSON nests deeper than {max_depth} levels; a request needs three")
        elif part in (b"]", b"}"):
            depth -= 1
        if count > MAX_JSON_PARTS:
            raise BadRequest(f"the JSON has more than {MAX_JSON_PARTS} parts; a request needs a few dozen")
