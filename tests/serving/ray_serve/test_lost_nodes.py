"""Which errors of Ray say that a replica's node is gone, and not only its process."""

from __future__ import annotations

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayActorError

from serve_app.ray_serve.model_client import is_node_lost

ACTOR = bytes(16)
PREEMPTED = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)


def died(text: str, node: NodeDeathInfo | None = None) -> ActorDiedError:
    return ActorDiedError(ActorDiedErrorContext(actor_id=ACTOR, error_message=text, node_death_info=node))


@pytest.mark.parametrize(
    "error",
    [
        ActorUnavailableError("RpcError: RPC error: Socket closed rpc_code: 14", ACTOR),
        died("The actor died because its node has died. Node Id: 92eaf4032194"),
        died("\tthe actor's node was terminated unexpectedly: health check failed"),
        died("\tthe actor's node was preempted: spot", PREEMPTED),
        died("", PREEMPTED),
        ObjectLostError("00ff" * 7, None, "of an actor"),
    ],
)
def test_a_node_that_is_gone_or_cannot_be_reached_is_lost(error: Exception) -> None:
    assert is_node_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"),
        died("The actor is dead because it was killed by `ray.kill`."),
        died("prevent node deaths by resource contention and significant loss of progress"),
        ActorDiedError(),
        RayActorError(),
        ValueError("node has died"),
    ],
)
def test_a_process_that_ended_is_not(error: Exception) -> None:
    assert not is_node_lost(error)
