"""Decoding of untrusted pictures in limited child processes."""
