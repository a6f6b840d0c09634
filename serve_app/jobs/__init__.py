"""Durable jobs: what was accepted, who runs it, how far it is, what came of it."""
