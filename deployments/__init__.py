"""The workshop: holds weights and makes pixels. Knows no HTTP and no Redis."""

__version__ = "0.1.0"
