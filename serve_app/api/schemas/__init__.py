"""Schemas that several dialects share."""
