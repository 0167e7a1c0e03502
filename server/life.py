"""From loading to draining: what a server does between its first and its last moment.

    Redis answers -> engine loaded -> head's weights taken -> ready -> …
    -> told to stop -> left the fleet -> drained

While the first weights are taken the server is in the fleet table already, as one that loads.

A background task that dies ends this, and so does an engine that is dead or gives no sign of life.
"""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Coroutine
from typing import Any

from safetensors import SafetensorError

from server.admission import Gate, capacity
from server.app import Holder
from server.costs import Cost
from server.engines import EngineName, choose, open_engine
from server.engines.base import Engine, SpeaksOpenAI
from server.follower import Follower
from server.following import check_store, open_follower
from server.liveness import alive
from server.rewards.pool import RewardPool
from server.service import RolloutService
from server.settings import ServerSettings
from server.states import CaughtUp, Drain
from server.tokens import Tokens
from server.waiting import own_id, patiently
from shared.coordination import RedisCoordinator
from shared.errors import ConfigError, SpokeError
from shared.threads import in_daemon_thread, leave_children

log = logging.getLogger("spoke.server")

HAND_BACK_S = 5
"""How long the answers to what was handed back may take to be read, seconds."""
ENGINE_CLOSE_S = 15
"""How long the engine may take to close, seconds: a process that stands still is killed meanwhile."""


async def life(settings: ServerSettings, holder: Holder, url: str, stop: asyncio.Event) -> None:
    """Load, catch up, serve, drain; everything opened here is closed here, in reverse.

    Args:
        settings: of the server.
        holder: gets the service once it may be asked.
        url: how trainers reach this server.
        stop: set when the server is told to stop.

    Raises:
        SpokeError: it cannot start as configured, or its engine died.
        Exception: what a background task died of.
    """
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await _coordinator(settings, stack)
        await check_store(settings)
        async with asyncio.TaskGroup() as group:  # loading takes minutes, and another's id ends it
            if coordinator is not None:
                group.create_task(own_id(coordinator, settings.server_id, settings.redis_wait_s))
            engine = await _engine(settings, stack)
        service = RolloutService(
            engine=engine,
            tokens=await in_daemon_thread(Tokens.load, settings.engine_settings.model),
            rewards=await _rewards(settings, stack),
            status=holder.status,
            model=settings.engine_settings.model,
            gate=Gate(_capacity(settings, engine)),
            budget=Cost(nodes=settings.max_tree_nodes, tokens=settings.max_tree_tokens),
            metrics=holder.metrics,
        )
        holder.watch(service)
        follower = None
        if isinstance(engine, SpeaksOpenAI):
            holder.openai = await engine.openai_app(settings.served_model_name or service.model)
        if coordinator is not None:
            follower = await open_follower(settings, holder, service, coordinator, url, stack)
            await _caught_up(follower, settings, engine)
        settle_heap()
        holder.service = service
        holder.status.note(CaughtUp())
        log.info("%s serves version %d at %s", settings.server_id, engine.version, url)
        try:
            await _serve_until(stop, _watch(engine, settings.liveness_s), follower)
        finally:
            holder.status.note(Drain())
            # Before anything is waited for: nobody may choose this server now.
            if coordinator is not None:
                with contextlib.suppress(SpokeError):
                    await coordinator.leave(settings.server_id, holder.status.instance)
        await _drain(service, settings.drain_s)


async def _caught_up(follower: Follower, settings: ServerSettings, engine: Engine) -> None:
    """Take the first weights; be in the fleet table meanwhile, and do not wait for an engine that is dead."""
    async with asyncio.TaskGroup() as group:
        beside = [
            group.create_task(follower.heartbeat()),
            group.create_task(_watch(engine, settings.liveness_s)),
        ]
        await follower.catch_up(settings.redis_wait_s)
        for task in beside:
            task.cancel()


def settle_heap() -> None:
    """Take what is loaded out of the garbage collector's sight: walking it cost a third of the service's time."""
    gc.collect()
    gc.freeze()


def _capacity(settings: ServerSettings, engine: Engine) -> Cost:
    """What may be in flight: the engine's own measure, where the settings say nothing else."""
    own = capacity(engine.info)
    return Cost(
        nodes=settings.max_nodes_in_flight or own.nodes,
        tokens=settings.max_tokens_in_flight or own.tokens,
    )


async def _serve_until(
    stop: asyncio.Event, watch: Coroutine[Any, Any, None], follower: Follower | None
) -> None:
    """Serve until told to stop; raises what a background task dies of."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(watch)]
        if follower is not None:
            tasks += [
                group.create_task(follower.run()),
                group.create_task(follower.heartbeat()),
            ]
        await stop.wait()
        for task in tasks:
            task.cancel()


async def _watch(engine: Engine, bound_s: float) -> None:
    """Raise when the engine is dead, or gives no sign of life within a bound."""
    died = asyncio.ensure_future(engine.died())
    try:
        while not died.done():
            await asyncio.wait({died}, timeout=bound_s)
            if not died.done():
                await alive(engine, bound_s)
        raise died.result()
    finally:
        died.cancel()


async def _drain(service: RolloutService, bound_s: float) -> None:
    """Let trees in flight end, within a bound; hand back the others (503), so that another server takes them."""
    status = service.status
    log.info("draining: %d requests in flight, at most %g s", status.in_flight, bound_s)
    if not await status.idle(bound_s):
        log.warning("handed back %d trees that did not end in time", service.hand_back())
        await status.idle(HAND_BACK_S)


async def _coordinator(
    settings: ServerSettings, stack: contextlib.AsyncExitStack
) -> RedisCoordinator | None:
    if settings.redis_url is None:
        return None
    coordinator = RedisCoordinator(settings.redis_url, settings.run)
    stack.push_async_callback(coordinator.close)
    await patiently(coordinator.ping, settings.redis_wait_s)
    return coordinator


async def _engine(settings: ServerSettings, stack: contextlib.AsyncExitStack) -> Engine:
    name = await in_daemon_thread(choose, EngineName(settings.engine))
    log.info("loading %s with %s", settings.engine_settings.model, name)
    try:
        engine = await open_engine(name, settings.engine_settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # What a missing, damaged or unknown checkpoint raises deep inside the libraries that read it.
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"--model {settings.engine_settings.model}: it cannot be loaded: {reason}"
        ) from error
    stack.push_async_callback(_closed, engine)
    return engine


async def _closed(engine: Engine) -> None:
    """Close the engine; one that hangs goes with the process, and the reason why it ends is said all the same."""
    try:
        async with asyncio.timeout(ENGINE_CLOSE_S):
            await engine.close()
    except TimeoutError:
        log.error("the engine does not end within %d s; it is left", ENGINE_CLOSE_S)
        leave_children()


async def _rewards(settings: ServerSettings, stack: contextlib.AsyncExitStack) -> RewardPool:
    pool = RewardPool(
        dict(settings.rewards),
        workers=settings.reward_workers,
        timeout_s=settings.reward_timeout_s,
        memory_bytes=int(settings.reward_memory_gib * 2**30),
        http=settings.reward_http,
    )
    stack.push_async_callback(pool.close)
    await pool.start()
    return pool
