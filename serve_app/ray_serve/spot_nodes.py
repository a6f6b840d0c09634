"""What a replica does when the cloud takes its node back."""

from __future__ import annotations

from serve_app.ray_serve import private_api


def drain_this_node(reason: str, deadline: float) -> None:
    """Have Serve replace what runs on this node, which ends at `deadline` (Unix seconds).

    A function of its own: those of private_api travel by value, for which Ray's classes there are not made.
    Raises RuntimeError when Ray refuses.
    """
    private_api.drain_node_of_this_process(reason, deadline)
