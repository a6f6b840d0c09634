"""Metrics of a replica, and where its log lines go."""
