"""Metrics and traces of the serving layer."""
