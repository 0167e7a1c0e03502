"""The typed client of rollout servers: `Client`, and `AsyncClient` for programs with an event loop.

Importing it takes httpx and what `shared/` needs, nothing of the trainer.
"""

from shared.stream import NodeLine
from trainer.client.async_client import AsyncClient
from trainer.client.reading import OnNode
from trainer.client.routing import ListServers, Target, fixed
from trainer.client.sync_client import Client

__all__ = ["AsyncClient", "Client", "ListServers", "NodeLine", "OnNode", "Target", "fixed"]
