"""URLs that callers send in headers, in their parts."""

from urllib.parse import SplitResult, urlsplit


def url_parts(url: str) -> SplitResult:
    """The URL in its parts; all of them empty when it cannot be parsed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
