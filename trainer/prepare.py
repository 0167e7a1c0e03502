"""What a run needs before its first step: folder, questions, model and optimizer, Redis, store and fleet."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.coordination import RedisCoordinator
from shared.errors import ConfigError
from shared.fsspec_store import FsspecStore
from trainer import checkpoints
from trainer.algorithms import AlgorithmName
from trainer.broadcasting import broadcasting
from trainer.checkpoints import Progress
from trainer.config import TrainSettings
from trainer.critic import Critic, load_critic
from trainer.data import Question, load
from trainer.fleet import Fleet, registered
from trainer.lease import hold
from trainer.ledger import Ledger
from trainer.losses import OffPolicy
from trainer.optimizer import PolicyOptimizer
from trainer.patience import Patience
from trainer.policy import DTYPES, load_policy, recompute_activations
from trainer.publish import Publisher
from trainer.replay import Replay
from trainer.serving import announced
from trainer.settings import Correction, KLEstimator
from trainer.storing import check_folder
from trainer.update import Learner


def open_folder(folder: Path, *, resume: bool) -> None:
    """Make the run's folder.

    Raises:
        ConfigError: it cannot be made; or a run is in it already, or none is, other than `resume` says.
    """
    if (folder / "metrics.jsonl").exists() and not resume:
        raise ConfigError(f"--run-dir {folder}: a run is in it already; give another, or --resume")
    if resume:
        checkpoints.newest(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run-dir {folder}: {error.strerror}; give another") from None


def save_settings(settings: TrainSettings, folder: Path) -> None:
    """Write a run's settings into its folder, once the run is ours: those of another trainer's stay."""
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
        off_policy=off_policy_of(settings),
    )


def off_policy_of(settings: TrainSettings) -> OffPolicy | None:
    """The correction of a run; None where it is synchronous."""
    trainer = settings.trainer
    if settings.fleet.max_staleness == 0 or trainer.correction is Correction.NONE:
        return None
    return OffPolicy(correction=trainer.correction, limit=trainer.correction_limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run begins with, or goes on with."""

    questions: list[Question]
    heldout: list[Question]
    learner: Learner
    replay: Replay | None
    """None where the run has none."""
    progress: Progress
    ledger: Ledger


def begin(settings: TrainSettings, folder: Path, *, resume: bool) -> Start:
    """Load data, model and optimizer; from the newest checkpoint where the run is resumed.

    Raises:
        ConfigError: something of it cannot be had.
    """
    checkpoint = checkpoints.newest(folder) if resume else None
    questions, heldout = questions_of(settings)
    learner, replay = build_learner(settings, checkpoint), replay_of(settings)
    progress, trees = Progress(step=0, version=0, sampled_tokens=0), None
    if checkpoint is not None:
        progress = checkpoints.restore(checkpoint, learner, replay)
        trees = progress.trees
    return Start(
        questions=questions,
        heldout=heldout,
        learner=learner,
        replay=replay,
        progress=progress,
        ledger=Ledger.of_run(folder, trees),
    )


def replay_of(settings: TrainSettings) -> Replay | None:
    """The run's replay, empty; None where it has none."""
    replay = settings.replay
    if not replay.enabled:
        return None
    return Replay(per_question=replay.per_question, max_age=replay.max_age, seed=settings.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """A run's ways to everybody else."""

    coordinator: RedisCoordinator
    publisher: Publisher
    patience: Patience
    fleet: Fleet


@contextlib.asynccontextmanager
async def connect(
    settings: TrainSettings, folder: Path, say: Callable[[str], None]
) -> AsyncIterator[Connections]:
    """Redis, the lease, the store and the fleet; closed in reverse.

    Before anything slow: a Redis that is away, or another trainer, is known at once.

    Args:
        settings: of the run.
        folder: of the run.
        say: shows what is waited for, in a line that stays.
    """
    fleet_settings = settings.fleet
    if fleet_settings.redis_url is None:
        raise ConfigError(
            "fleet.redis_url: training needs a Redis; set it with --set fleet.redis_url=redis://…, "
            "or SPOKE_REDIS_URL"
        )
    url = fleet_settings.store or f"file://{(folder / 'weights').resolve()}"
    store = FsspecStore(url, settings.run)
    check_folder(store, "fleet.store")
    say = once(say)
    async with contextlib.AsyncExitStack() as stack:
        coordinator = RedisCoordinator(fleet_settings.redis_url, settings.run)
        stack.push_async_callback(coordinator.close)
        lease = await stack.enter_async_context(
            hold(coordinator, store.versions, settings.run, say)
        )
        patience = Patience(
            servers=coordinator.servers,
            min_servers=fleet_settings.min_servers,
            wait_s=fleet_settings.wait_s,
            pause_s=fleet_settings.pause_s,
            tell=say,
        )
        store_url = await stack.enter_async_context(announced(fleet_settings, store, folder))
        fleet = Fleet(
            registered(coordinator),
            concurrency=settings.rollout.concurrency,
            timeout_s=settings.rollout.timeout_s,
            keep_nodes=fleet_settings.keep_nodes,
            patience=patience,
        )
        stack.push_async_callback(fleet.close)
        broadcasts = await stack.enter_async_context(
            broadcasting(settings, coordinator.servers, say)
        )
        publisher = Publisher(
            store=store,
            store_url=store_url,
            coordinator=coordinator,
            lease=lease,
            run=settings.run,
            dtype=fleet_settings.dtype,
            keep=fleet_settings.keep_versions,
            anchor_every=fleet_settings.anchor_every,
            most_changed=fleet_settings.most_changed,
            # One more than ours: the newest version is always on its way to somebody.
            max_staleness=fleet_settings.max_staleness + 1,
            wait_s=fleet_settings.pause_s,
            status=say,
            broadcasts=broadcasts,
        )
        # After an error nothing is waited for; what runs beside must not ask Redis once it is closed.
        stack.push_async_callback(publisher.give_up)
        yield Connections(
            coordinator=coordinator, publisher=publisher, patience=patience, fleet=fleet
        )
        await publisher.close()


def once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Say nothing twice in a row, since who waits says so again and again."""
    last = ""

    def saying(text: str) -> None:
        nonlocal last
        if text != last:
            say(text)
        last = text

    return saying
