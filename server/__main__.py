"""`python -m server` (also `spoke-server`): parse, check what can be checked at once, then load and serve.

Imports little at the top: `--help` answers at once.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.addresses import UNREAD_S, listening
from shared.errors import ConfigError, SpokeError
from shared.redis_url import VARIABLE, from_command_line
from shared.store_url import VARIABLE as STORE_VARIABLE
from shared.store_url import store_token

if TYPE_CHECKING:
    from server.rewards.limits import HttpLimits
    from server.settings import ServerSettings


def parser() -> argparse.ArgumentParser:
    """The command line of a rollout server."""
    parse = argparse.ArgumentParser(
        prog="spoke-server",
        description="A Spoke rollout server: POST /rollout_tree samples trees of continuations.",
        epilog="`spoke-server grade --help`: grade the responses of a file, without a model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parse.add_argument
    add(
        "--model", required=True, help="checkpoint: a directory in Hugging Face format, or a hub id"
    )
    add("--engine", choices=["auto", "vllm", "transformers"], default="auto")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--max-model-len", type=int, default=None, help="most tokens of prompt plus response")
    add("--max-batch", type=int, default=256, help="most sequences that run at once")
    add("--threads", type=int, default=1, help="torch threads on a CPU")
    add("--kv-cache-gib", type=float, default=1.0, help="memory for keys and values on a CPU")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        help="share of a GPU that vLLM may take",
    )
    add(
        "--weight-transfer",
        choices=["nccl", "gloo"],
        default=None,
        help="weights may come by broadcast from a trainer of the same cluster (vLLM): nccl between GPUs; gloo "
        "between CPUs, for tests",
    )
    add("--seed", type=int, default=None, help="of the engine; requests may bring their own")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 takes a free one")
    _add_bounds(add)
    add(
        "--redis-url",
        default=None,
        help="follow a run's weights; without it the checkpoint is served alone; one with a "
        "password goes into SPOKE_REDIS_URL",
    )
    add("--run", default="default", help="name of the run to follow")
    add(
        "--store",
        default=None,
        help="weight store, where its URL here is not the one that is announced",
    )
    _add_weights(add)
    add("--advertise-url", default=None, help="how trainers and other servers reach this one")
    add(
        "--served-model-name",
        default=None,
        help="what the OpenAI routes call the model; default: what --model says",
    )
    add("--server-id", default=None, help="name in the fleet table")
    _add_rewards(add)
    _add_load(add)
    return parse


def _add_weights(add: Callable[..., object]) -> None:
    """How a run's weights are followed."""
    add(
        "--no-peers",
        action="store_true",
        help="fetch weights from the store alone and tell no other server what is held here",
    )
    add(
        "--weights-dir",
        type=Path,
        default=None,
        help="folder for fetched versions, used again after a restart; default: one that goes with the process",
    )
    add(
        "--redis-wait", type=float, default=60.0, help="seconds that Redis may be away at the start"
    )
    add(
        "--max-lag",
        type=int,
        default=None,
        help="most versions that this server may be behind and serve; default: what the trainer announces",
    )


def _add_rewards(add: Callable[..., object]) -> None:
    """Rewards of one's own, and what each may use."""
    add(
        "--reward",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION|URL",
        help="a reward of your own; the token of a URL is in SPOKE_REWARD_TOKEN_NAME",
    )
    add("--reward-workers", type=int, default=2, help="processes of each reward function in use")
    add("--reward-memory-gib", type=float, default=2.0, help="address space of each of them")
    add("--reward-timeout", type=float, default=5.0, help="hard limit for one response, seconds")
    add("--reward-http-timeout", type=float, default=60.0, help="of one batch to a URL, seconds")
    add("--reward-http-batch", type=int, default=64, help="most responses of one batch to a URL")
    add("--reward-http-connections", type=int, default=8, help="most batches at once to each URL")


def _add_load(add: Callable[..., object]) -> None:
    """How much is taken on at once, and how a server ends."""
    add(
        "--max-nodes-in-flight",
        type=int,
        default=None,
        help="nodes of all trees that grow at once; beyond it and a short queue: 429 (default: from the engine)",
    )
    add("--max-tokens-in-flight", type=int, default=None, help="the same for tokens")
    add(
        "--max-tree-nodes", type=int, default=100_000, help="most nodes of one tree; beyond it: 413"
    )
    add("--max-tree-tokens", type=int, default=8_000_000, help="the same for tokens")
    add(
        "--liveness-timeout",
        type=float,
        default=30.0,
        help="seconds that the engine may give no sign of life; then the server ends, to be started again",
    )
    add(
        "--drain",
        type=float,
        default=30.0,
        help="seconds that trees in flight may take to end after a stop; then they are handed back",
    )


def _add_bounds(add: Callable[..., object]) -> None:
    """Who may ask, and for how much."""
    add(
        "--auth",
        choices=["auto", "on", "off"],
        default="auto",
        help="ask for bearer tokens: auto does where there are any, and refuses to listen beyond "
        "loopback without",
    )
    add(
        "--tokens-file",
        type=Path,
        default=None,
        help="TOKEN scope[,scope…] a line, scopes rollout, admin, metrics, weights; also in SPOKE_TOKENS",
    )
    add("--max-body-mib", type=float, default=16.0, help="of a request's body")
    add("--max-depth", type=int, default=16, help="levels of a tree plan")
    add("--max-leaves", type=int, default=16384, help="of a request's plan")


def settings(arguments: Sequence[str] | None) -> "ServerSettings":
    """Settings from the command line.

    Raises:
        ConfigError: an argument cannot be used.
    """
    args = parser().parse_args(arguments)
    from server.auth import VARIABLE as TOKENS_VARIABLE
    from server.auth import AuthMode, enforced, load_tokens, with_store_token
    from server.engines.settings import EngineSettings
    from server.flags import check
    from server.limits import Limits
    from server.settings import ServerSettings

    check(args)
    rewards = []
    for text in args.reward:
        name, equals, path = text.partition("=")
        if not (name and equals and ":" in path):
            raise ConfigError(f"--reward {text}: write NAME=MODULE:FUNCTION or NAME=URL")
        rewards.append((name, path))
    redis_url = from_command_line(args.redis_url, "--redis-url", os.environ)
    os.environ.pop(VARIABLE, None)  # no child process, such as a reward function's, has it
    in_environment = bool(os.environ.get(TOKENS_VARIABLE, "").strip())
    asked_for = enforced(AuthMode(args.auth), args.host, load_tokens(args.tokens_file, os.environ))
    token = store_token(os.environ)
    os.environ.pop(STORE_VARIABLE, None)
    own = {} if args.server_id is None else {"server_id": args.server_id}
    return ServerSettings(
        engine=args.engine,
        engine_settings=EngineSettings(
            model=args.model,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            device=args.device,
            threads=args.threads,
            seed=args.seed,
            kv_cache_gib=args.kv_cache_gib,
            max_batch=args.max_batch,
            gpu_memory_utilization=args.gpu_memory_utilization,
            weight_transfer=args.weight_transfer,
        ),
        host=args.host,
        port=args.port,
        auth=AuthMode(args.auth),
        tokens=with_store_token(asked_for, token),
        tokens_file=args.tokens_file,
        tokens_in_environment=in_environment,
        limits=Limits(
            body_bytes=int(args.max_body_mib * 2**20), depth=args.max_depth, leaves=args.max_leaves
        ),
        redis_url=redis_url,
        run=args.run,
        store=args.store,
        store_token=token,
        peers=not args.no_peers,
        weights_dir=args.weights_dir,
        redis_wait_s=args.redis_wait,
        max_lag=args.max_lag,
        advertise_url=args.advertise_url,
        served_model_name=args.served_model_name,
        rewards=tuple(rewards),
        reward_workers=args.reward_workers,
        reward_timeout_s=args.reward_timeout,
        reward_memory_gib=args.reward_memory_gib,
        max_nodes_in_flight=args.max_nodes_in_flight,
        max_tokens_in_flight=args.max_tokens_in_flight,
        max_tree_nodes=args.max_tree_nodes,
        max_tree_tokens=args.max_tree_tokens,
        drain_s=args.drain,
        liveness_s=args.liveness_timeout,
        reward_http=_http_limits(args),
        **own,
    )


def _http_limits(args: argparse.Namespace) -> "HttpLimits":
    from server.rewards.limits import HttpLimits

    return HttpLimits(
        timeout_s=args.reward_http_timeout,
        batch=args.reward_http_batch,
        connections=args.reward_http_connections,
    )


def bind(host: str, port: int, unread_s: float = UNREAD_S) -> socket.socket:
    """A listening socket, taken before the model is loaded: a port in use is known at once.

    Args:
        host: to listen at.
        port: 0 takes a free one.
        unread_s: see `shared.addresses.listening`.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        return listening(host, port, unread_s)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"--host {host} --port {port}: {reason}; choose another --port, or 0"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one server until it is told to stop. Exit codes: 0 stopped, 1 failed, 2 cannot start as configured.

    With `grade` as the first argument, grade a file instead; see `server.grade`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["grade"]:
        from server.grade import main as grade

        return grade(arguments[1:])
    # Before numpy is imported: its threads, which nothing here uses, would forbid that vLLM's process is forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        chosen = settings(arguments)
        with contextlib.closing(bind(chosen.host, chosen.port)) as listener:
            from server.run import serve

            return asyncio.run(serve(chosen, listener))
    except SpokeError as error:
        print(f"spoke-server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
