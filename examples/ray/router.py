"""Sends questions on one image to the replica that has it cached."""

import hashlib
import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ImageRouter(RequestRouter):
    """By `x-image-hash`, which trimserve's clients send; calls without it go to one of two drawn replicas."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try, in order.

        The largest digest of image and replica wins, so a replica that comes or goes moves its own images only.
        """
        digest = _digest(pending_request)
        if digest is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        ranked = sorted(candidate_replicas, key=lambda replica: _weight(digest, str(replica.replica_id)), reverse=True)
        return [[replica] for replica in ranked]


def _digest(request: PendingRequest | None) -> str | None:
    context = None if request is None else request.metadata.grpc_context
    return None if context is None else dict(context.invocation_metadata()).get("x-image-hash")


def _weight(digest: str, replica: str) -> bytes:
    return hashlib.sha256(f"{digest} {replica}".encode()).digest()
