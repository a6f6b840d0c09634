"""ASGI middleware, one per file, in the order of stack.py."""
