"""Weights: where they are, what device they go to, how they are loaded."""
