"""ASGI middleware, one per file, in the order that app.py lists."""
