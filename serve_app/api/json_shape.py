"""How deep and how full a JSON body is, checked before it is parsed.

Strings, which are nearly all of a body with pictures, are skipped by searches for their ends.
"""

from deployments.protocol.errors import BadRequest

MAX_JSON_PARTS = 10_000  # brackets and commas; 32 MiB of "[],[]," would become a gigabyte of lists
MAX_QUOTES = 100_000  # of strings, and escaped ones within them
START_BYTES = 64 * 2**10  # of a body with more quotes; only these are looked at
MAX_BYTES_BESIDE_STRINGS = 2**20
STRUCTURE = b"[]{},"
OTHER = bytes(set(range(256)) - set(STRUCTURE))
BACKSLASH = ord("\\")


def check_json_shape(body: bytes, max_depth: int) -> None:
    """Raises BadRequest when brackets nest deeper than max_depth, or when there are far too many values."""
    fault = ""
    if body.count(b'"') > MAX_QUOTES:
        fault, body = f"{MAX_QUOTES} quotes", body[:START_BYTES]
    beside = _beside_strings(body)
    if len(beside) > MAX_BYTES_BESIDE_STRINGS:
        fault = f"{MAX_BYTES_BESIDE_STRINGS} bytes beside its strings"
    structure = beside.translate(None, OTHER)
    if len(structure) > MAX_JSON_PARTS:
        fault = f"{MAX_JSON_PARTS} parts"
    _check_depth(structure[:MAX_JSON_PARTS], max_depth)
    if fault:
        raise BadRequest(f"the JSON has more than {fault}; a request needs a few dozen values")


def _beside_strings(body: bytes) -> bytes:
    """What is not within strings, up to where it exceeds MAX_BYTES_BESIDE_STRINGS.

    A string that never ends is the rest of the body.
    """
    beside, at = bytearray(), 0
    while at < len(body) and len(beside) <= MAX_BYTES_BESIDE_STRINGS:
        begin = body.find(b'"', at)
        end = len(body) if begin < 0 else begin
        beside += body[at : min(end, at + MAX_BYTES_BESIDE_STRINGS + 1)]
        at = len(body) if begin < 0 else _end_of_string(body, begin + 1)
    return bytes(beside)


def _end_of_string(body: bytes, at: int) -> int:
    """Where the string that begins at `at` has ended: after its quote."""
    quote = body.find(b'"', at)
    while quote >= 0 and _backslashes_before(body, quote, at) % 2:
        quote = body.find(b'"', quote + 1)
    return len(body) if quote < 0 else quote + 1


def _backslashes_before(body: bytes, end: int, start: int) -> int:
    """How many backslashes stand right before `end`, not before `start`."""
    if end == start or body[end - 1] != BACKSLASH:
        return 0
    known, step = 1, 1  # compared in blocks, twice as long each time: a body may be all backslashes
    while step:
        block = body[max(start, end - known - step) : end - known]
        if block and block == b"\\" * len(block):
            known, step = known + len(block), step * 2
        else:
            step = step // 2 if block else 0
    return known


def _check_depth(structure: bytes, max_depth: int) -> None:
    depth = 0
    for part in structure:
        if part in b"[{":
            depth += 1
            if depth > max_depth:
                raise BadRequest(f"the JSON nests deeper than {max_depth} levels; a request needs three")
        elif part in b"]}":
            depth -= 1
