"""Finished and given pictures as files."""
