"""The gsm8k reward on answers that a model might really give, and the names of rewards."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.rewards import RewardPool
from server.rewards.gsm8k import gsm8k
from server.rewards.registry import look_up, reward_targets
from shared.answers import line_number
from shared.errors import ConfigError, RequestError

ODD_ANSWERS = [
    json.loads(line)
    for line in Path(__file__).with_name("gsm8k_answers.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("case", ODD_ANSWERS, ids=[case["why"] for case in ODD_ANSWERS])
def test_gsm8k_grades_odd_answers(case):
    assert gsm8k(case["response"], case["reference"], {}) == case["reward"]


def test_there_are_fifty_odd_answers_of_both_kinds():
    assert len(ODD_ANSWERS) == 50
    assert {case["reward"] for case in ODD_ANSWERS} == {0.0, 1.0}


def test_every_reference_of_the_real_data_grades_itself_and_nothing_else(gsm8k):
    from server.rewards.gsm8k import gsm8k as grade

    for part in ("train", "test"):
        for line in (gsm8k / f"{part}.jsonl").read_text().splitlines():
            answer = json.loads(line)["answer"]
            number = answer.rsplit("####", 1)[1]
            assert grade(answer, number, {}) == 1.0
            assert grade(answer, answer, {}) == 1.0
            assert grade(f"#### {number}1", answer, {}) == 0.0


@given(st.integers(-(10**12), 10**12), st.integers(0, 4), st.sampled_from([",", " ", ""]))
def test_a_number_survives_being_written_out(units, decimals, separator):
    value = Fraction(units, 10**decimals)
    written = f"{float(abs(units) // 10**decimals):,.0f}".replace(",", separator)
    if decimals:
        written += f".{abs(units) % 10**decimals:0{decimals}d}"
    sign = "-" if units < 0 else ""
    assert line_number(f" {sign}${written}.") == value


@pytest.mark.parametrize(
    "reference", ["", "seventy-two", "####", "72 or 73", "1\n2", "#### x", "5/0"]
)
def test_gsm8k_refuses_a_reference_without_one_number(reference):
    with pytest.raises(RequestError) as refused:
        gsm8k("#### 72", reference, {})
    assert refused.value.field == "reward.reference"
    assert repr(reference) not in refused.value.detail, "a caller may not see it"


def test_gsm8k_takes_the_services_option_and_no_other():
    assert gsm8k("#### 72", "72", {"unfinished": -1.0}) == 1.0
    with pytest.raises(RequestError, match="did you mean 'unfinished'") as refused:
        gsm8k("#### 72", "72", {"unfinishd": -1.0})
    assert refused.value.field == "reward.options.unfinishd"


@pytest.mark.timeout(20)
def test_gsm8k_is_quick_on_hostile_text():
    for piece in (" ", "$", "1", "1 ", "1,", "1/", "#### x ", "####", "\n"):
        text = piece * (100_000 // len(piece))
        assert gsm8k(f"#### {text}", "72", {}) == 0.0


def test_an_unknown_name_is_refused_with_the_nearest_and_the_list():
    targets = reward_targets({"exact": "my_rewards:exact"})
    assert look_up(targets, "exact") == "my_rewards:exact"
    with pytest.raises(RequestError) as refused:
        look_up(targets, "gsmk8")
    assert refused.value.field == "reward.name"
    assert "did you mean 'gsm8k'? Known: exact, gsm8k, math" in refused.value.detail


@pytest.mark.parametrize(
    "target", ["", "exact", "my_rewards.exact", "my rewards:exact", "my_rewards:exact()", ".a:b"]
)
def test_a_malformed_path_is_refused_with_an_example(target):
    with pytest.raises(ConfigError, match=r"write NAME=package.module:function"):
        RewardPool({"exact": target})


def test_a_built_in_name_cannot_be_taken():
    with pytest.raises(ConfigError, match="'gsm8k' is built in"):
        RewardPool({"gsm8k": "my_rewards:exact"})


def test_the_server_side_loads_nothing_heavy():
    heavy = "{'torch', 'vllm', 'fastapi', 'transformers', 'sympy', 'numpy'}"
    code = f"import sys, server.rewards; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
