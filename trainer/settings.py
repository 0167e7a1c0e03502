"""The sections of a training run's settings, one model each; `config` reads them from TOML. No torch here."""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)  # fmt: skip

from shared.addresses import host_and_port
from shared.redis_url import redacted
from shared.store_url import shown
from shared.wire import Plan, Savings


class Settings(BaseModel):
    """Base of every section: frozen; unknown keys, and numbers that are none, refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(Settings):
    """The policy."""

    path: str
    """Checkpoint in Hugging Face format: a hub id, or a directory (relative ones start at the config file)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights that compute; bfloat16 keeps float32 masters in the optimizer."""
    device: str = "auto"
    """`auto` is a GPU where there is one."""
    threads: int = Field(default=1, ge=1)
    """Torch threads on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


class DataSettings(Settings):
    """Questions with answers, in GSM8K's format."""

    train: str
    """`problems:…`, a JSONL file, `gsm8k`, or `hub:NAME[:CONFIG]:SPLIT`."""
    heldout: str
    question_field: str = "question"
    answer_field: str = "answer"
    prompt: str = "{question}\n"
    """Template of the prompt."""
    chat: bool = False
    """Send the filled template as a user's message through the model's chat template."""

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, prompt: str) -> str:
        if "{question}" not in prompt:
            raise ValueError("the template needs {question}")
        return prompt


class RewardSettings(Settings):
    """Which reward function of the servers grades, and its options."""

    name: str = "gsm8k"
    options: dict[str, Any] = Field(default_factory=dict)


class InFlight(StrEnum):
    """What becomes of a tree while new weights reach the server that samples it."""

    CONTINUE = "continue"
    """It goes on with them; each token says which version sampled it."""
    RESTART = "restart"
    """It is begun anew with them, so that it is of one version."""


class RolloutSettings(Settings):
    """What is sampled in each step."""

    questions: int = Field(ge=1)
    """Questions a step, one tree each."""
    plan: Plan
    temperature: float = Field(default=1.0, gt=0.0)
    """0 would be greedy, which explores nothing; top-p and top-k are not offered, since the importance ratio
    needs the whole distribution."""
    max_tokens: int = Field(default=1024, ge=1)
    resample: int = Field(default=0, ge=0)
    """Most questions a step that replace ones whose tree gives no gradient (DAPO's dynamic sampling)."""
    savings: Savings = Savings()
    """Early decisions that save tokens, in training alone: an evaluation has none."""
    concurrency: int = Field(default=64, ge=1)
    """Most trees in flight."""
    in_flight: InFlight = InFlight.CONTINUE
    """What becomes of a tree while new weights arrive; matters with `fleet.max_staleness` above 0."""
    reproducible: bool = True
    """Seed every tree, so that equal weights sample equal trees; vLLM samples faster without."""
    timeout_s: float = Field(default=600.0, gt=0.0)
    """Bound of one tree, retries included."""

    @model_validator(mode="after")
    def _savings_fit_plan(self) -> Self:
        self.savings.check_plan(self.plan)
        return self


class Decay(StrEnum):
    """How the learning rate falls after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """AdamW, clipping and schedule; the defaults are the authors'."""

    learning_rate: float = Field(default=1e-6, gt=0, description="Peak of the schedule.")
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; null does not clip."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="Share of all steps that the warm-up takes."
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Steps of the warm-up; null goes by the ratio."
    )
    decay: Decay = Decay.LINEAR
    floor: float = Field(
        default=0.0, ge=0, le=1, description="Share of the peak that the decay ends at."
    )


class KLEstimator(StrEnum):
    """Per-token estimators of KL(policy | reference) at tokens sampled from the policy."""

    NONE = "none"
    K1 = "k1"
    """logprob - ref. Unbiased as a number, but its gradient as a loss carries no KL."""
    K2 = "k2"
    """(logprob - ref)^2 / 2."""
    K3 = "k3"
    """exp(d) - d - 1 with d = clamp(ref - logprob, -10, 10): never negative."""


class Average(StrEnum):
    """What one token weighs in the loss; see `averaging`."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    CONSTANT = "constant"
    MICRO_BATCH = "micro_batch"


class Correction(StrEnum):
    """What a token weighs that other weights sampled than those the step starts from; see `losses`."""

    TRUNCATED = "truncated"
    """w = min(proximal probability / behaviour probability, limit)."""
    MASKED = "masked"
    """w where it lies between 1 / limit and limit; every other token leaves the loss."""
    NONE = "none"
    """1: the ratio is taken to the behaviour policy, as in synchronous training."""


class ReplaySettings(Settings):
    """Segments that train in later iterations than the one that sampled them; see `replay`."""

    enabled: bool = False
    per_question: int = Field(default=32, ge=1)
    """Most segments of one question's tree in an iteration."""
    max_age: int = Field(default=8, ge=0)
    """Iterations that a segment may wait."""


class CriticSettings(OptimizerSettings):
    """PPO's critic, on top of its optimizer's own settings."""

    learning_rate: float = Field(default=1e-5, gt=0, description="Peak of the schedule.")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="How far from its old value it may move; null does not clip."
    )
    warmup: int = Field(
        default=0, ge=0, description="Iterations at the start in which the critic alone learns."
    )


class Whitening(StrEnum):
    """Over which tokens advantages are whitened."""

    BATCH = "batch"
    """The participating tokens of the whole optimizer batch."""
    MICRO_BATCH = "micro_batch"
    """Those of each micro-batch: the authors' code, where magnitudes and signs are lost."""
    OFF = "off"


class TrainerSettings(OptimizerSettings):
    """The update, on top of the optimizer's own settings."""

    steps: int = Field(ge=1)
    """Iterations: rollout, update, publish. With a budget, the most there may be."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Stop once so many tokens were sampled in training; the learning rate follows the share that is spent."""
    budget_seconds: float | None = Field(default=None, gt=0)
    """Stop after so many seconds of training, measurements and checkpoints not counted."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates an iteration; each sees its share of the trees."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's trees."""
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.2, gt=0.0)
    kl: KLEstimator = KLEstimator.K3
    kl_coef: float = Field(default=1e-4, ge=0.0)
    """0 loads no reference model."""
    whiten: Whitening = Whitening.BATCH
    average: Average = Average.TOKEN
    """How tokens are averaged into the loss; see `averaging`."""
    correction: Correction = Correction.TRUNCATED
    """For tokens that older weights sampled; read with `fleet.max_staleness` above 0 alone."""
    correction_limit: float = Field(default=2.0, gt=1.0)
    """C: the largest weight of a token (`truncated`), or where its probability may have moved to (`masked`)."""
    token_budget: int = Field(default=16384, ge=1)
    """Most tokens of a micro-batch, padding included."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 is by time and at the end alone."""
    checkpoint_minutes: float = Field(default=15.0, ge=0.0)
    """One is also made after the first step that ends so long after the last one; 0 is never."""
    keep_checkpoints: int = Field(default=3, ge=0)
    """Newest that stay; older ones are deleted once a newer one is whole, so have room for one more. 0 keeps
    all."""

    @property
    def total_updates(self) -> int:
        """Where the learning-rate schedule ends."""
        return self.steps * self.updates_per_iteration

    @property
    def updates_per_iteration(self) -> int:
        """Most optimizer updates of one iteration."""
        return self.updates_per_step * self.epochs


class FleetSettings(Settings):
    """Where the servers are and how versions reach them."""

    redis_url: str | None = Field(default=None, repr=False)
    """May carry a password, which no run folder gets; `SPOKE_REDIS_URL` goes before it."""
    store: str | None = Field(default=None, repr=False)
    """Weight store, any fsspec URL; None is `weights` in the run folder, for servers on this machine. One with a
    password is announced without it, in `advertise_store`, and no run folder gets it."""
    serve_at: str | None = None
    """`HOST:PORT`: serve the store, which is a folder here, over HTTP; `SPOKE_STORE_TOKEN` is asked for."""
    advertise_store: str | None = None
    """URL of the store as servers reach it; None is `http://HOST:PORT` of `serve_at`, else `store`."""
    keep_nodes: bool = True
    """Take trees node by node, so that one whose server dies goes on at another with what has finished; off, it is
    sampled anew there, and answers have about half of the bytes."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the published weights."""
    max_staleness: int = Field(default=0, ge=0)
    """n: versions that a trained token may be older than the policy it trains. 0 is synchronous; above, rollouts
    of the next n steps run while a step trains."""
    min_servers: int = Field(default=1, ge=1)
    """Below so many live servers the run pauses."""
    wait_s: float = Field(default=300.0, gt=0.0)
    """Bound of the wait for the first servers, and for a version to reach those that live; one that lags longer is
    left behind."""
    pause_s: float = Field(default=3600.0, gt=0.0)
    """Bound of a pause, for servers or for a Redis that is away; then the run stops."""
    keep_versions: int = Field(default=3, ge=1)
    """Newest versions that stay in the store whatever the servers hold."""
    anchor_every: int = Field(default=10, ge=1)
    """Versions from one full copy to the next; those between are deltas where these are worth it."""
    most_changed: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of elements above which no delta is tried; 1 tries always, for slow lines; at 0 only
    where none is seen to have changed."""
    weight_transfer: Literal["none", "nccl", "gloo"] = "none"
    """Broadcast each announced version to the servers of this cluster that were started with the same
    `--weight-transfer`, beside the store; see docs/weight_transfer.md. `SPOKE_TOKEN` needs scope `admin`."""
    transfer_address: str | None = None
    """Of this machine, as those servers reach it, on ports that the system chooses."""
    transfer_s: float = Field(default=60.0, gt=0.0, le=600.0)
    """Bound of meeting those servers, and of each broadcast to begin; then they fetch from the store."""

    @model_validator(mode="after")
    def _transfer_has_an_address(self) -> Self:
        if self.weight_transfer != "none" and not self.transfer_address:
            raise ValueError(
                f"weight_transfer = {self.weight_transfer!r} needs transfer_address: this machine's, as the "
                "servers reach it"
            )
        return self

    @field_validator("serve_at")
    @classmethod
    def _is_an_address(cls, text: str | None) -> str | None:
        if text is not None:
            host_and_port(text)
        return text

    @field_validator("advertise_store")
    @classmethod
    def _can_be_reached(cls, url: str | None) -> str | None:
        if url is not None and "://" not in url and not url.startswith("/"):
            raise ValueError(
                f"{url!r} is no URL that servers can reach, such as http://trainer.example:8100"
            )
        return url

    @field_serializer("redis_url")
    def _without_password(self, url: str | None) -> str | None:
        return url and redacted(url)

    @field_serializer("store", "advertise_store")
    def _without_user(self, url: str | None) -> str | None:
        return url and shown(url)


class EvaluationSettings(Settings):
    """Accuracy on held-out questions."""

    questions: int = Field(default=500, ge=1)
    samples: int = Field(default=4, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    greedy: bool = True
    """Measure greedy accuracy too, before and after."""
    every: int = Field(default=0, ge=0)
    """Steps between measurements during training; 0 is none."""
    points: int = Field(default=0, ge=0)
    """Measurements during a run with a budget, at equal shares of it, the end included."""
    questions_during: int = Field(default=128, ge=1)


class LaunchSettings(Settings):
    """The servers that `spoke quickstart` starts on this machine."""

    servers: int = Field(default=2, ge=1)
    engine: Literal["auto", "vllm", "transformers"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    arguments: tuple[str, ...] = ()
    """Further arguments of `python -m server`."""
