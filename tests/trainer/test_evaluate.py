"""Evaluation: the estimators against naive twins, the file of samples across kills and resumptions, the report."""

import asyncio
import io
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from fake_rollouts import ANSWER, Fake
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shared.errors import ConfigError, FleetError, NoTreeError, RequestError
from shared.tree import FinishReason, Node, Role
from shared.wire import (
    GroupPlan,
    RolloutTreeRequest,
    RolloutTreeResponse,
    Timing,
    Usage,
    WeightVersions,
)
from trainer import data
from trainer.cli import main
from trainer.commands.eval import default_folder, parse_ks
from trainer.data import Question, load, usual
from trainer.estimators import default_ks, estimate, majority_at_k, pass_at_k, quantile
from trainer.evaluate import ask_all, evaluate
from trainer.evaluation_report import Lost, Refused, as_json, headline, summarise_samples, table
from trainer.samples import EvalSettings, SampleFile, samples_of
from trainer.settings import DataSettings, RewardSettings

SETTINGS = EvalSettings(
    data="a.jsonl", question_field="question", answer_field="answer", prompt="{question}\n", chat=False,
    reward="gsm8k", samples=2, temperature=1.0, max_tokens=8, seed=0,
)  # fmt: skip
QUESTIONS = [Question(id=str(i), text=f"{i} + 1?", reference=str(i + 1)) for i in range(5)]


def answer(*rewards: float, version: int = 3, texts: tuple[str, ...] = ()) -> RolloutTreeResponse:
    nodes = [Node(id=0, parent=None, depth=0, role=Role.PROMPT, token_ids=[1])]
    for i, reward in enumerate(rewards, start=1):
        nodes.append(
            Node(
                id=i,
                parent=0,
                depth=1,
                token_ids=[5] * i,
                logprobs=[-0.5] * i,
                versions=[(version, i)],
                finish_reason=FinishReason.LENGTH if i > 2 else FinishReason.STOP,
                reward=reward,
                text=texts[i - 1] if texts else f"é\n#### {7 * reward:g}",
            )
        )
    sampled = sum(range(len(rewards) + 1))
    return RolloutTreeResponse(
        nodes=nodes, server_id="s", model="m", timing=Timing(queue_s=0, sample_s=0, reward_s=0),
        usage=Usage(prompt_tokens=1, sampled_tokens=sampled, computed_prefill_tokens=1, cached_tokens=0),
        weight_versions=WeightVersions(min=version, max=version),
    )  # fmt: skip


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(
    right: list[bool], draw: Any
) -> None:
    k = draw.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(float(share), abs=1e-15)


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_away() -> None:
    assert pass_at_k(4096, 1, 1) == pytest.approx(1 / 4096, rel=1e-12)
    assert pass_at_k(4096, 1, 4096) == 1.0
    assert pass_at_k(4096, 0, 2048) == 0.0


@given(
    st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "c"]), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
        max_size=7,
    ),
    st.data(),
)
def test_majority_at_k_is_the_mean_over_every_way_to_break_the_tie(
    samples: list[tuple[str | None, float]], draw: Any
) -> None:
    """In any order of the answers the first of the most frequent wins; all orders are equally likely."""
    k = draw.draw(st.integers(1, len(samples)))
    voters = [(a, Fraction(r)) for a, r in samples[:k] if a is not None]
    rewards = []
    for order in itertools.permutations(sorted({a for a, _ in voters})):
        winner = max(order, key=[a for a, _ in voters].count, default=None)
        its = [r for a, r in voters if a == winner]
        rewards.append(sum(its, Fraction()) / max(1, len(its)))
    naive = float(sum(rewards, Fraction()) / len(rewards))
    answers, graded = zip(*samples, strict=True)
    assert majority_at_k(answers, graded, k) == pytest.approx(naive, abs=1e-12)


def test_a_majority_can_be_wrong_where_a_sample_is_right_and_right_where_most_are_wrong() -> None:
    assert majority_at_k(["7", "7", "8"], [0.0, 0.0, 1.0], 3) == 0.0
    assert majority_at_k(["8", "1", "2", "8", "3"], [1.0, 0.0, 0.0, 1.0, 0.0], 5) == 1.0
    assert majority_at_k([None, None, "8"], [0.0, 0.0, 1.0], 3) == 1.0
    assert majority_at_k([None, None], [0.0, 0.0], 2) == 0.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_standard_error_is_that_of_a_mean_over_questions(values: list[float]) -> None:
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    assert found.standard_error == pytest.approx(spread / math.sqrt(len(values)), abs=1e-9)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=30))
def test_quantiles_are_linear_between_neighbours(values: list[int]) -> None:
    exact = statistics.quantiles(values, n=10, method="inclusive")
    assert [quantile(sorted(values), q / 10) for q in range(1, 10)] == pytest.approx(exact)


def test_values_of_k() -> None:
    assert [default_ks(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]
    assert parse_ks("4, 1,4", 4) == [1, 4]
    for text in ("", "0", "1,5", "x", "1.5"):
        with pytest.raises(ConfigError, match=f"--k {text}"):
            parse_ks(text, 4)
    assert default_folder("problems:heldout?seed=2").name.startswith(
        "eval-problems-heldout-seed-2-"
    )
    assert default_folder("some/where/a.jsonl").name.startswith("eval-a-")


def written(folder: Path, count: int = 3) -> SampleFile:
    file = SampleFile.new(folder, SETTINGS)
    for question in QUESTIONS[:count]:
        file.append(samples_of(question, answer(1.0, 0.0), "gsm8k"))
    return file


def test_a_file_of_samples_comes_back_as_it_was(tmp_path: Path) -> None:
    file = written(tmp_path / "new" / "out")
    lines = [json.loads(line) for line in (file.folder / "samples.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["sample"]) for line in lines] == [
        (str(q), s) for q in range(3) for s in range(2)
    ]
    assert lines[0] == {
        "question_id": "0", "sample": 0, "question": "0 + 1?", "reference": "1", "response": "é\n#### 7",
        "answer": "7", "reward": 1.0, "reward_error": None, "finish_reason": "stop", "tokens": 1,
        "versions": [[3, 1]], "server": "s", "model": "m",
    }  # fmt: skip
    again = SampleFile.resume(file.folder, SETTINGS, QUESTIONS)
    assert again.groups == file.groups
    again.append(samples_of(QUESTIONS[3], answer(0.0, 0.0), "gsm8k"))
    assert list(SampleFile.resume(file.folder, SETTINGS, QUESTIONS).groups) == ["0", "1", "2", "3"]


def test_wherever_a_kill_cuts_the_file_whole_questions_stay(tmp_path: Path) -> None:
    """Every length of the last question's lines: all of it or nothing; what is asked again is written again."""
    whole = (written(tmp_path).folder / "samples.jsonl").read_bytes()
    second = len(b"".join(whole.splitlines(keepends=True)[:4]))
    for size in range(second, len(whole)):
        (tmp_path / "samples.jsonl").write_bytes(whole[:size])
        file = SampleFile.resume(tmp_path, SETTINGS, QUESTIONS)
        assert list(file.groups) == ["0", "1"]
        assert (tmp_path / "samples.jsonl").read_bytes() == whole[:second]
    file.append(samples_of(QUESTIONS[2], answer(1.0, 0.0), "gsm8k"))
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", "b.jsonl"), ("samples", 4), ("temperature", 0.5), ("seed", 1), ("prompt", "Q: {question}"),
        ("reward", "math"), ("max_tokens", 9), ("chat", True), ("answer_field", "solution"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    written(tmp_path)
    other = SETTINGS.model_copy(update={name: value})
    with pytest.raises(ConfigError, match=f"was sampled with {name} = "):
        SampleFile.resume(tmp_path, other, QUESTIONS)


def test_what_cannot_be_resumed_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start without --resume"):
        SampleFile.resume(tmp_path, SETTINGS, QUESTIONS)
    written(tmp_path)
    with pytest.raises(ConfigError, match="it holds an evaluation; go on with --resume"):
        SampleFile.new(tmp_path, SETTINGS)
    changed = [Question(id="0", text="another", reference="1"), *QUESTIONS[1:]]
    with pytest.raises(ConfigError, match=r"question 0 .* changed"):
        SampleFile.resume(tmp_path, SETTINGS, changed)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_text("".join([lines[0], "{\n", *lines[2:]]))
    with pytest.raises(ConfigError, match="line 2"):
        SampleFile.resume(tmp_path, SETTINGS, QUESTIONS)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"settings.json"):
        SampleFile.resume(tmp_path, SETTINGS, QUESTIONS)
    with pytest.raises(ConfigError, match="Not a directory"):
        SampleFile.new(tmp_path / "settings.json" / "x", SETTINGS).append(
            samples_of(QUESTIONS[0], answer(1.0, 0.0), "gsm8k")
        )


def groups(*answers: RolloutTreeResponse) -> dict[str, list[Any]]:
    return {
        question.id: samples_of(question, a, "gsm8k")
        for question, a in zip(QUESTIONS, answers, strict=False)
    }


def test_the_summary_of_three_questions_by_hand() -> None:
    settings = SETTINGS.model_copy(update={"samples": 4})
    found = summarise_samples(
        settings,
        groups(answer(1, 0, 0, 0), answer(0, 0, 0, 0), answer(1, 1, 1, 0)),
        ks=[1, 2, 4],
        votes=True,
        refused=[Refused(question_id="3", field="reward.reference", detail="no")],
    )
    assert found.questions == 3
    assert found.pass_at[1].mean == pytest.approx(4 / 12)
    assert found.pass_at[1].standard_error == pytest.approx(
        statistics.stdev([1 / 4, 0, 3 / 4]) / 3**0.5
    )
    assert found.pass_at[2].mean == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found.pass_at[4].mean == pytest.approx(2 / 3)
    assert found.majority_at is not None
    assert found.majority_at[2].mean == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found.majority_at[4].mean == pytest.approx(1 / 3)
    assert found.unfinished == 0.5
    assert (found.tokens["mean"], found.tokens["p50"], found.tokens["max"]) == (2.5, 2.5, 4)
    assert found.sampled_tokens == 30
    as_text = json.dumps(as_json(found))
    assert json.loads(as_text)["refused"][0]["question_id"] == "3"
    assert json.loads(as_text)["pass_at"]["4"]["mean"] == pytest.approx(2 / 3)


def shown(found: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    console.print(headline(found), soft_wrap=True)
    console.print(table(found))
    return stream.getvalue()


def test_the_table_shows_what_there_is_and_warns() -> None:
    found = summarise_samples(SETTINGS, groups(answer(1, 0), answer(1, 1)), ks=[1, 2], votes=True)
    text = shown(found)
    for part in (
        "2 questions x 2 samples",
        "pass@1",
        "75.0 %",
        "± 25.0",
        "majority@2",
        "weight version",
    ):
        assert part in text
    assert "mean reward" not in text
    assert "not of one model" not in text
    mixed = summarise_samples(
        SETTINGS,
        groups(answer(0.5, 0, version=3), answer(1, 1, version=5)),
        ks=[1],
        votes=False,
        refused=[Refused(question_id="9", field="prompt", detail="too long")],
        lost=[Lost(question_id="8", detail="no tree within 600 s")],
        before=(3, 3),
    )
    text = shown(mixed)
    for part in (
        "mean reward", "0.625", "weight versions 3 to 5 (3 to 3 before --resume)",
        "1 questions were refused", "question 9: prompt: too long", "1 questions were not answered in time",
        "question 8: no tree",
    ):  # fmt: skip
        assert part in text
    assert "majority" not in text


class ScriptedFleet:
    """Answers as told, in an order of its own; a real one cannot be made to refuse one question."""

    def __init__(self, script: Callable[[str], Any]) -> None:
        self.script = script
        self.asked: Counter[str] = Counter()

    async def rollout_tree(self, request: RolloutTreeRequest) -> RolloutTreeResponse:
        question = (request.request_id or "").rpartition("/")[2]
        self.asked[question] += 1
        for _ in range(10 - int(question)):  # the last asked answers first
            await asyncio.sleep(0)
        given = self.script(question)
        if isinstance(given, Exception):
            raise given
        if given is None:
            await asyncio.Event().wait()
        return given


async def run_evaluate(fleet: ScriptedFleet) -> Any:
    return await evaluate(
        fleet, QUESTIONS, data=DataSettings(train="x", heldout="x"), reward=RewardSettings(), samples=2,
        temperature=1.0, max_tokens=8, name="n",
    )  # fmt: skip


async def test_evaluate_gives_the_mean_over_all_questions() -> None:
    found = await run_evaluate(
        ScriptedFleet(lambda q: answer(float(q == "0"), 1.0, version=int(q)))
    )
    assert (found.questions, found.samples, found.version) == (5, 2, 0)
    assert found.mean == pytest.approx(0.6)
    assert found.standard_error == pytest.approx(0.1)


@pytest.mark.parametrize("error", [FleetError("no tree"), RequestError("prompt", "no")])
async def test_in_training_the_first_failure_ends_the_measurement(error: Exception) -> None:
    """The others would hang for ever: they are cancelled."""
    with pytest.raises(type(error)) as raised:
        await asyncio.wait_for(
            run_evaluate(ScriptedFleet(lambda q: error if q == "2" else None)), 10
        )
    assert raised.value is error


async def test_in_training_a_question_that_no_server_answers_is_left_out_and_counted() -> None:
    lost = NoTreeError("no tree within 1 s")
    found = await run_evaluate(
        ScriptedFleet(lambda q: lost if q in "24" else answer(float(q == "0"), 1.0))
    )
    assert (found.questions, found.lost) == (3, 2)
    assert found.mean == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    with pytest.raises(NoTreeError) as raised:
        await run_evaluate(ScriptedFleet(lambda q: lost))
    assert raised.value is lost


async def test_a_refused_question_loses_no_other() -> None:
    fleet = ScriptedFleet(lambda q: RequestError("prompt", "no") if q == "2" else answer(1.0, 0.0))
    plan = GroupPlan(samples=2)
    requests = [
        RolloutTreeRequest(request_id=f"n/{question.id}", prompt="1", plan=plan)
        for question in QUESTIONS
    ]
    answered, refused, lost = [], [], []
    await ask_all(
        fleet,
        requests,
        on_answer=lambda place, _: answered.append(place),
        on_lost=lambda place, _: lost.append(place),
        on_refusal=lambda place, error: refused.append((place, error.field)),
    )
    assert answered == [4, 3, 1, 0]
    assert (refused, lost) == ([(2, "prompt")], [])


def test_eval_goes_on_without_a_question_that_got_no_answer_and_resumes_with_it(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stuck = True

    def script(i: int) -> Any:
        return server.stall() if stuck and "1 + 1" in server.bodies[i]["prompt"] else ANSWER

    server = fake(script)
    command = [
        "eval", "--server", server.url, "--data", str(tmp_path / "a.jsonl"), "--samples", "1",
        "--timeout", "0.8", "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    assert main(command) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["questions"], [lost["question_id"] for lost in found["lost"]]) == (2, ["1"])
    stuck, asked = False, len(server.bodies)
    assert main([*command, "--resume"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["questions"], found["lost"], len(server.bodies)) == (3, [], asked + 1)


def test_math500_is_asked_for_a_box_and_graded_as_mathematics(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """The hub cannot be reached here: `datasets` loads a local folder by the same call."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "tiny").mkdir()
    row = {"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "answer": "2", "unique_id": "x"}
    (tmp_path / "tiny" / "test.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(data, "MATH500", f"{tmp_path / 'tiny'}:test")
    own = usual("math500")
    assert own.reward == "math"
    assert r"\boxed{}" in own.prompt
    assert load("math500", question_field=own.question_field, answer_field=own.answer_field) == [
        Question(id="0", text="1+1?", reference="2")
    ]
    assert usual("gsm8k:train").reward == usual("a.jsonl").reward == "gsm8k"
