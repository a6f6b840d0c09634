"""The workshop: holds weights and makes pixels. Knows no HTTP and no Redis."""
