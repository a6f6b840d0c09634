"""Signed statements in finished files on how they were made (C2PA), used by both layers."""
