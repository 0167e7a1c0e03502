"""Configuration: every shipped file loads, every mistake is named with its remedy."""

from pathlib import Path

import pytest

from shared.errors import ConfigError
from trainer.config import TrainSettings, load

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("**/*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_says_its_hardware(path: Path) -> None:
    settings = load(path)
    assert settings.hardware


def test_the_quickstart_finds_its_model_from_anywhere(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load(ROOT / "configs" / "quickstart.toml")
    assert (Path(settings.model.path) / "config.json").is_file()


def test_overrides_are_toml_values_or_bare_words(tmp_path: Path) -> None:
    settings = load(
        ROOT / "configs" / "quickstart.toml",
        [
            "trainer.learning_rate=1e-6",
            "run=other",
            "data.chat=true",
            'rollout.plan={kind="group", samples=3}',
            "fleet.redis_url=redis://somewhere:1/0",
            "launch.arguments=['--threads', '2']",
        ],
    )
    assert settings.trainer.learning_rate == 1e-6
    assert settings.run == "other"
    assert settings.data.chat is True
    assert settings.rollout.plan.kind == "group"
    assert settings.fleet.redis_url == "redis://somewhere:1/0"
    assert settings.launch.arguments == ("--threads", "2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.learning_rat=1",
            "unknown key 'trainer.learning_rat'; the nearest known one is 'learning_rate'",
        ),
        ("trainer.in_flight=restart", r"'trainer\.in_flight'; did you mean rollout\.in_flight\?"),
        ("fleet.serve_at=0.0.0.0:99999", r"fleet\.serve_at: .*write HOST:PORT"),
        ("fleet.serve_at=http://h:1", r"fleet\.serve_at: .*write HOST:PORT"),
        ("fleet.advertise_store=h:8100", r"fleet\.advertise_store: .*no URL that servers can"),
        ("fleet.wait_s=inf", r"fleet\.wait_s: .*finite"),
        ("trainer.betas=[2, 0.9]", r"trainer\.betas\.0: .*less than 1"),
        ("trainr.steps=1", "unknown key 'trainr'; the nearest known one is 'trainer'"),
        (
            "rollout.plan.branch_factor=[2]",
            "unknown key 'rollout.plan.branch_factor'; .*'branch_factors'",
        ),
        ("trainer.steps=0", r"trainer\.steps: .*greater than or equal to 1"),
        ("trainer.checkpoint_minutes=-1", r"trainer\.checkpoint_minutes: .*or equal to 0"),
        ("trainer.checkpoint_minutes=nan", r"trainer\.checkpoint_minutes: .*finite"),
        ("trainer.keep_checkpoints=-1", r"trainer\.keep_checkpoints: .*or equal to 0"),
        ("trainer.learning_rate=fast", r"trainer\.learning_rate: "),
        ("rollout.temperature=0", r"rollout\.temperature: .*greater than 0"),
        ("data.prompt=hello", r"data\.prompt: the template needs \{question\}"),
        ("run=a b", "run: run name 'a b'"),
        ("algorithm.name=grpo", 'use rollout.plan = { kind = "group"'),
        ("algorithm.name=gpro", r"algorithm\.name: "),
        ("nonsense", "write section.key=value"),
        ("run.x=1", "run is a value, not a section"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ROOT / "configs" / "quickstart.toml", [override])


def test_files_that_are_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match="run: Field required"):
        load(tmp_path / "empty.toml")


def test_settings_cannot_be_changed() -> None:
    settings = load(ROOT / "configs" / "quickstart.toml")
    with pytest.raises(ValueError, match="frozen"):
        settings.run = "other"  # type: ignore[misc]
    assert TrainSettings.model_validate_json(settings.model_dump_json()) == settings


PPO = 'rollout.plan={kind="group", samples=3}'
CHAIN = 'rollout.plan={kind="chain", samples=2, value_rollouts=3}'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.name=ppo"],
            r"ppo does not read a plan of kind 'tree': use .*kind = \"group\"",
        ),
        (
            ["algorithm.name=vineppo", PPO],
            r"vineppo does not read .*'group': use .*kind = \"chain\"",
        ),
        ([CHAIN], r"spo_tree does not read a plan of kind 'chain': use .*kind = \"tree\""),
        (["algorithm.name=vineppo", CHAIN], "vineppo needs a value at the prompt"),
        (["trainer.average=sequence"], r"trainer.average = sequence is about whole responses"),
        (["algorithm.name=ppo", PPO, "replay.enabled=true"], "replay.enabled: ppo's advantages"),
        (["algorithm.overlong_buffer=128"], "overlong_buffer = 128 leaves nothing of .*128"),
        (["evaluation.points=3"], "evaluation.points are shares of a budget: set"),
        (
            ["rollout.savings.settle=2"],
            r"unknown key 'rollout\.savings\.settle'; the nearest known one is 'settle_after'",
        ),
        (["rollout.savings.settle_after=1"], r"rollout\.savings\.settle_after: .*equal to 2"),
        (
            ["algorithm.name=spo_chain", CHAIN, "rollout.savings.settle_after=2"],
            "rollout: savings are for plans tree and group",
        ),
        (
            ["algorithm.name=grpo", PPO, "rollout.savings.probe=3"],
            r"rollout: savings\.probe is for plan tree; a group has savings\.settle_after",
        ),
        (
            ["algorithm.name=grpo", PPO, "rollout.savings.branch_tokens=300"],
            r"rollout: savings\.branch_tokens is for plan tree",
        ),
        (
            ["algorithm.name=ppo", PPO, "rollout.savings.settle_after=2"],
            r"rollout\.savings\.settle_after: ppo learns from responses of equal reward",
        ),
        (
            ["algorithm.overlong_buffer=32", "rollout.savings.probe=3"],
            r"rollout\.savings: servers see rewards without algorithm\.overlong_buffer's penalty",
        ),
        (["preset=authors"], "preset = 'authors': there is reference"),
        (["trainer.whiten=true"], r"trainer\.whiten: .*'batch', 'micro_batch' or 'off'"),
        (
            [
                'rollout.plan={kind="chain", samples=2, value_rollouts=3, partition={kind="fixed", token=3}}'
            ],
            "unknown key 'rollout.plan.partition.token'; the nearest known one is 'tokens'",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ROOT / "configs" / "quickstart.toml", overrides)


def test_savings_are_off_unless_asked_for() -> None:
    path = ROOT / "configs" / "quickstart.toml"
    assert set(load(path).rollout.savings.model_dump().values()) == {None}
    chosen = load(path, ["rollout.savings.settle_after=2", "rollout.savings.branch_tokens=500"])
    assert chosen.rollout.savings.settle_after == 2
    assert chosen.rollout.savings.branch_tokens == 500
    # What goes by tokens alone does not mind a penalty.
    load(path, ["algorithm.overlong_buffer=32", "rollout.savings.branch_tokens=500"])


def test_the_reference_preset_is_under_what_a_file_says() -> None:
    settings = load(ROOT / "configs" / "quickstart.toml", ["preset=reference"])
    assert settings.trainer.whiten == settings.trainer.average == "micro_batch"
    assert settings.algorithm.zero_tolerance == 0
    assert settings.algorithm.mask_threshold == 0.9
    chosen = load(ROOT / "configs" / "quickstart.toml", ["preset=reference", "trainer.whiten=off"])
    assert chosen.trainer.whiten == "off"


def test_a_file_stands_on_its_base_and_the_bases_model_is_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model").mkdir()
    quickstart = (ROOT / "configs" / "quickstart.toml").read_text()
    (tmp_path / "under.toml").write_text(quickstart.replace("quickstart/warmstart", "model"))
    over = tmp_path / "sub" / "over.toml"
    over.write_text(
        'base = "../under.toml"\nrun = "over"\n[trainer]\nsteps = 3\n[rollout]\nquestions = 2\n'
    )
    settings = load(over)
    assert settings.run == "over"
    assert settings.trainer.steps == 3
    assert settings.trainer.learning_rate == 2e-4
    assert settings.rollout.questions == 2
    assert settings.rollout.plan.kind == "tree"
    assert settings.model.path == str(tmp_path / "model")
    over.write_text('base = "over.toml"')
    with pytest.raises(ConfigError, match="leads back to itself"):
        load(over)
    over.write_text('base = "gone.toml"')
    with pytest.raises(ConfigError, match=r"gone\.toml: No such file"):
        load(over)


def test_null_is_none() -> None:
    for word in ("null", "none"):
        settings = load(ROOT / "configs" / "quickstart.toml", [f"algorithm.mask_threshold={word}"])
        assert settings.algorithm.mask_threshold is None
