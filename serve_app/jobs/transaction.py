"""How the job store talks to its server: as every book of this floor does."""

from serve_app.transaction import MAX_TRIES, StoreUnreachable, begin, connect, reachable, transact

__all__ = ["MAX_TRIES", "StoreUnreachable", "begin", "connect", "reachable", "transact"]
