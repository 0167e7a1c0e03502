"""What a run needs before its first step: folder, questions, model and optimizer, Redis, store and fleet."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import torch

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError
from shared.store import FsspecStore
from trainer import checkpoints
from trainer.algorithms import AlgorithmName
from trainer.config import TrainSettings
from trainer.critic import Critic, load_critic
from trainer.data import Question, load
from trainer.fleet import Fleet, registered
from trainer.lease import hold
from trainer.optimizer import PolicyOptimizer
from trainer.policy import DTYPES, load_policy, recompute_activations
from trainer.publish import Publisher
from trainer.serving import announced
from trainer.settings import KLEstimator
from trainer.update import Learner


def open_folder(settings: TrainSettings, folder: Path, *, resume: bool) -> None:
    """Make the run's folder and write its settings into it.

    Raises:
        ConfigError: a run is in it already and is not to be resumed.
    """
    if (folder / "metrics.jsonl").exists() and not resume:
        raise ConfigError(f"--run-dir {folder}: a run is in it already; give another, or --resume")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(settings.model_dump_json(indent=2))


def questions_of(settings: TrainSettings) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions."""
    data = settings.data
    fields = {"question_field": data.question_field, "answer_field": data.answer_field}
    return load(data.train, **fields), load(data.heldout, **fields)


def build_learner(settings: TrainSettings, checkpoint: Path | None) -> Learner:
    """Policy, reference, critic and their optimizers, from the start or from a checkpoint.

    Raises:
        ConfigError: the model or the checkpoint cannot be loaded.
    """
    torch.set_num_threads(settings.model.threads)
    device = settings.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[settings.model.dtype]
    policy = load_policy(checkpoint or settings.model.path, dtype, device)
    if settings.model.gradient_checkpointing:
        recompute_activations(policy)
    reference = None
    if settings.trainer.kl_coef > 0 and settings.trainer.kl is not KLEstimator.NONE:
        reference = load_policy(settings.model.path, dtype, device)
    updates = settings.trainer.total_updates
    critic = None
    if settings.algorithm.name is AlgorithmName.PPO:
        source = settings.model.path if checkpoint is None else checkpoint / checkpoints.CRITIC
        model = load_critic(source, dtype, device)
        if settings.model.gradient_checkpointing:
            recompute_activations(model)
        critic = Critic(
            model=model,
            optimizer=PolicyOptimizer(model, settings.critic, total_steps=updates),
            settings=settings.critic,
            token_budget=settings.trainer.token_budget,
            warmup_updates=settings.critic.warmup * settings.trainer.updates_per_iteration,
        )
    return Learner(
        policy=policy,
        reference=reference,
        optimizer=PolicyOptimizer(policy, settings.trainer, total_steps=updates),
        settings=settings.trainer,
        temperature=settings.rollout.temperature,
        mask_threshold=settings.algorithm.mask_threshold,
        max_tokens=settings.rollout.max_tokens,
        critic=critic,
    )


@contextlib.asynccontextmanager
async def connect(
    settings: TrainSettings, folder: Path, status: Callable[[str], None]
) -> AsyncIterator[tuple[RedisCoordinator, Publisher, Fleet]]:
    """Redis, the lease, the store and the fleet; closed in reverse.

    Before anything slow: a Redis that is away, or another trainer, is known at once.
    """
    fleet_settings = settings.fleet
    if fleet_settings.redis_url is None:
        raise ConfigError(
            "fleet.redis_url: training needs a Redis; set it with --set fleet.redis_url=redis://…, "
            "or SPOKE_REDIS_URL"
        )
    url = fleet_settings.store or f"file://{(folder / 'weights').resolve()}"
    store = FsspecStore(url, settings.run)
    async with contextlib.AsyncExitStack() as stack:
        coordinator = RedisCoordinator(fleet_settings.redis_url, settings.run)
        stack.push_async_callback(coordinator.close)
        lease = await stack.enter_async_context(
            hold(coordinator, lambda: max(store.versions(), default=-1), settings.run, status)
        )
        store_url = await stack.enter_async_context(announced(fleet_settings, store, folder))
        fleet = Fleet(
            registered(coordinator),
            concurrency=settings.rollout.concurrency,
            timeout_s=settings.rollout.timeout_s,
            keep_nodes=fleet_settings.keep_nodes,
        )
        stack.push_async_callback(fleet.close)
        publisher = Publisher(
            store=store,
            store_url=store_url,
            coordinator=coordinator,
            lease=lease,
            run=settings.run,
            dtype=fleet_settings.dtype,
            keep=fleet_settings.keep_versions,
            anchor_every=fleet_settings.anchor_every,
            wait_s=fleet_settings.wait_s,
            status=status,
        )
        yield coordinator, publisher, fleet
