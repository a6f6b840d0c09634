"""Metrics: the declarations of both layers, samples of a replica, and their export through Ray."""
