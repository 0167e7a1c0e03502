"""What one rollout server is started with."""

import os
import socket
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from server.auth import AuthMode, TokenTable
from server.engines.settings import EngineSettings
from server.limits import Limits
from server.rewards.limits import HttpLimits


def _server_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One server: its engine, its address, and the run whose weights it follows."""

    engine: str
    """`auto`, `vllm` or `transformers`."""
    engine_settings: EngineSettings
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    auth: AuthMode = AuthMode.AUTO
    tokens: TokenTable | None = None
    """Asked for by the guard; None lets everybody in."""
    tokens_file: Path | None = None
    """Where some of them came from."""
    tokens_in_environment: bool = False
    """Whether there were some in the environment too, asked for or not."""
    limits: Limits = field(default_factory=Limits)
    redis_url: str | None = field(default=None, repr=False)
    """None: serve the checkpoint alone and follow nobody."""
    run: str = "default"
    store: str | None = None
    """Weight store, where this server reaches it under another URL than the trainer announces."""
    store_token: str | None = field(default=None, repr=False)
    """Sent to stores over HTTP and to other servers, and accepted from them for weights alone."""
    peers: bool = True
    """Whether weights come from other servers too, and go to them."""
    weights_dir: Path | None = None
    """Where fetched versions lie, to be used again after a restart; None: a folder that goes with the process."""
    redis_wait_s: float = 60.0
    """How long Redis may be away at the start, seconds."""
    max_lag: int | None = None
    """Most versions that this server may lag behind and serve; None takes what the head says."""
    advertise_url: str | None = None
    """How trainers reach this server; None is `http://HOST:PORT`."""
    served_model_name: str | None = None
    """What requests of the OpenAI routes call the model; None is `engine_settings.model`."""
    server_id: str = field(default_factory=_server_id)
    rewards: tuple[tuple[str, str], ...] = ()
    """(name, `module:function` or URL) of the user's own rewards."""
    reward_workers: int = 2
    """Processes of each reward function in use."""
    reward_timeout_s: float = 5.0
    """Hard limit for one response."""
    reward_memory_gib: float = 2.0
    """Address space of each of these processes."""
    max_nodes_in_flight: int | None = None
    """Nodes of all trees that grow at once; None takes the engine's batch as the measure."""
    max_tokens_in_flight: int | None = None
    """Tokens of all trees that grow at once; None takes the engine's memory as the measure."""
    max_tree_nodes: int = 100_000
    """Most nodes of one tree."""
    max_tree_tokens: int = 8_000_000
    """Most tokens of one tree: what fits an answer of `shared.codec.LIMIT_BYTES`, at up to 16 bytes a token."""
    liveness_s: float = 30.0
    """Longest wait for the engine's sign of life, seconds; an engine that gives none takes the server down."""
    drain_s: float = 30.0
    """How long trees in flight may take to end after a stop, seconds; then they are handed back."""
    reward_http: HttpLimits = field(default_factory=HttpLimits)
    """What each reward of a URL may use."""
