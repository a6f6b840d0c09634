"""Continuous batching for unmodified pipeline calls: many fibers, one device, one forward at a time."""
