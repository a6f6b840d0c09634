"""Continuous batching for unmodified pipeline calls: many fibers, one device, shared forward passes."""
