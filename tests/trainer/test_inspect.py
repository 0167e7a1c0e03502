"""`spoke inspect`: numbers to check by hand, the JSON contract, the page, and every mistake in one line."""

import html
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import ConfigError
from shared.wire import RolloutTreeResponse
from trainer.algorithms import AlgorithmSettings
from trainer.cli import main
from trainer.inspect_html import page
from trainer.inspect_text import LOWERED, MASKED, RAISED, draw, render
from trainer.inspection import inspect
from trainer.token_text import load_decoder, pieces, token_texts
from trainer.tree_file import parse

ROOT = Path(__file__).resolve().parents[2]
WARMSTART = ROOT / "configs" / "quickstart" / "warmstart"
QUICKSTART = ROOT / "configs" / "quickstart.toml"

SURE, UNSURE = math.log(0.95), math.log(0.5)

# V: 1 -> 0.5, prompt -> 0.75. By hand: A = -0.25, +0.5, -0.5, +0.25.
BY_HAND = [
    {"text": "How many?"},
    {"parent": 0, "text": "ab", "token_ids": [11, 12], "logprobs": [UNSURE, SURE]},
    {"parent": 1, "text": "c", "token_ids": [13], "logprobs": [UNSURE], "reward": 1},
    {"parent": 1, "text": "d", "token_ids": [14], "logprobs": [SURE], "reward": 0},
    {"parent": 0, "text": "e", "token_ids": [15], "logprobs": [math.log(0.9)], "reward": 1.0},
]
# Values come from the rollouts: 0.5 at the prompt, 1.0 behind the first segment, the reward at the end.
CHAIN = [
    {"token_ids": [1]},
    {"parent": 0, "role": "rollout", "text": "no", "reward": 0},
    {"parent": 0, "role": "rollout", "text": "yes", "reward": 1},
    {"parent": 0, "text": "x", "token_ids": [2], "logprobs": [UNSURE]},
    {"parent": 3, "role": "rollout", "text": "sure", "reward": 1},
    {"parent": 3, "text": "y", "token_ids": [3], "logprobs": [UNSURE], "reward": 0},
]


def inspected(nodes, **settings):
    return inspect(parse(json.dumps(nodes)), AlgorithmSettings(**settings))


def numbers(inspection):
    return {one["id"]: (one["value"], one["advantage"]) for one in inspection.as_json()}


def save(folder: Path, tree) -> str:
    (folder / "tree.json").write_text(json.dumps(tree))
    return str(folder / "tree.json")


def changed(node: int, **fields):
    return [one | fields if i == node else one for i, one in enumerate(BY_HAND)]


def without(node: int, field: str):
    return [
        {k: v for k, v in one.items() if i != node or k != field} for i, one in enumerate(BY_HAND)
    ]


def run_json(capsys, *arguments: str):
    assert main(["inspect", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


# --- numbers


def test_json_is_one_object_a_segment(tmp_path, capsys):
    assert run_json(capsys, save(tmp_path, BY_HAND)) == [
        {"id": 1, "value": 0.5, "advantage": -0.25, "participates": [True, False]},
        {"id": 2, "value": 1.0, "advantage": 0.5, "participates": [True]},
        {"id": 3, "value": 0.0, "advantage": -0.5, "participates": [False]},
        {"id": 4, "value": 1.0, "advantage": 0.25, "participates": [False]},
    ]


def test_normalised_divides_by_the_siblings_spread(tmp_path, capsys):
    found = run_json(capsys, save(tmp_path, BY_HAND), "--set", "algorithm.advantage=normalised")
    assert [one["advantage"] for one in found] == pytest.approx([-1, 1, -1, 1], abs=1e-6)


def test_dropped_segments_have_no_advantage_and_nothing_participates():
    equal = changed(3, reward=1)
    for drop, expected in ((True, [False]), (False, [True])):
        (one,) = (s for s in inspected(equal, drop_zero=drop).as_json() if s["id"] == 2)
        assert (one["advantage"], one["participates"]) == (0.0, expected)
    empty = inspected(changed(4, token_ids=[], logprobs=[]))
    assert numbers(empty)[1] == (0.5, -0.25)
    assert empty.as_json()[3] == {"id": 4, "value": 1.0, "advantage": 0.0, "participates": []}


def test_values_of_the_file_are_never_read():
    assert numbers(inspected(changed(1, value=0.9))) == numbers(inspected(BY_HAND))


def test_segments_without_tokens_of_their_own_have_an_advantage():
    nodes = [{}, {"parent": 0}, {"parent": 1, "reward": 1}, {"parent": 0, "reward": 0}]
    found = inspected(nodes)
    assert numbers(found) == {1: (1.0, 0.5), 2: (1.0, 0.0), 3: (0.0, -0.5)}
    assert found.totals()["tokens"] == 0


def test_a_chain_has_its_values_from_rollouts(tmp_path, capsys):
    found = run_json(capsys, save(tmp_path, CHAIN))  # spo_chain is taken for it
    assert found == [
        {"id": 3, "value": 1.0, "advantage": 0.5, "participates": [True]},
        {"id": 5, "value": 0.0, "advantage": -1.0, "participates": [True]},
    ]
    assert run_json(capsys, save(tmp_path, CHAIN), "--set", "algorithm.name=vineppo") == found
    without_rollouts = [CHAIN[0], CHAIN[3], CHAIN[5] | {"parent": 1}]
    assert numbers(inspected(without_rollouts, name="spo_chain")) == {1: (None, 0), 2: (0, 0)}


@pytest.mark.parametrize(("name", "expected"), [("grpo", [1, -1]), ("rloo", [1, -1])])
def test_groups(name, expected):
    response = {"parent": 0, "token_ids": [1], "logprobs": [UNSURE]}
    nodes = [{}, response | {"reward": 1}, response | {"reward": 0}]
    found = inspected(nodes, name=name).as_json()
    assert [one["advantage"] for one in found] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["advantage", "advantage_normalised"])
def test_the_authors_trees_need_parents_and_rewards_alone(golden, kind):
    settings = {"advantage": "difference" if kind == "advantage" else "normalised"}
    cases = json.loads((golden / "tree_values.json").read_text())["cases"]
    for case in cases:
        nodes = [{key: node[key] for key in ("id", "parent", "reward")} for node in case["nodes"]]
        found = numbers(inspected(nodes, **settings))
        theirs = {node["id"]: (node["value"], node[kind]) for node in case["nodes"][1:]}
        assert found.keys() == theirs.keys()
        for node_id, expected in theirs.items():
            assert found[node_id] == pytest.approx(expected, abs=1e-12)


def test_the_documented_example_is_what_the_page_says():
    saved = parse((ROOT / "docs" / "inspect-tree.json").read_text("utf-8"))
    totals = inspect(saved, AlgorithmSettings()).totals()
    assert (totals["participating tokens"], totals["tokens"]) == (6, 286)
    assert (totals["trained segments"], totals["segments"]) == (7, 9)


def test_aborted_leaves_count_in_nothing():
    found = inspected(changed(3, finish_reason="abort", reward=None))
    assert numbers(found) == {1: (1.0, 0.0), 2: (1.0, 0.0), 3: (None, 0.0), 4: (1.0, 0.0)}


def test_the_prompt_alone_is_a_tree_without_segments(tmp_path, capsys):
    assert run_json(capsys, save(tmp_path, [{"text": "hm"}])) == []
    assert main(["inspect", save(tmp_path, [{"text": "hm"}])]) == 0
    assert "0 of 0 tokens participate" in capsys.readouterr().out


def test_overlong_responses_lose_what_the_trainer_takes(tmp_path, capsys):
    response = {"parent": 0, "token_ids": [7] * 120, "logprobs": [-1] * 120, "reward": 1}
    tree = save(tmp_path, [{}, response])
    buffer = ["--set", "algorithm.overlong_buffer=16"]
    (one,) = run_json(capsys, tree, "--config", str(QUICKSTART), *buffer)  # its limit is 128
    assert one["value"] == 0.5
    assert main(["inspect", tree, *buffer]) == 2
    assert "--config" in capsys.readouterr().err


# --- settings


def test_the_mask_is_the_settings(tmp_path, capsys):
    tree = save(tmp_path, BY_HAND)
    by_name = {}
    for value in ("0.4", "0.96", "null", "none"):
        found = run_json(capsys, tree, "--set", f"algorithm.mask_threshold={value}")
        by_name[value] = [token for one in found for token in one["participates"]]
    assert by_name["0.4"] == [False] * 5
    assert by_name["0.96"] == by_name["null"] == by_name["none"] == [True] * 5


def test_a_configuration_gives_its_algorithm_and_set_overrides_it(tmp_path, capsys):
    written = QUICKSTART.read_text().replace('"difference"', '"normalised"')
    (tmp_path / "own.toml").write_text(written)
    config = ["--config", str(tmp_path / "own.toml")]
    tree = save(tmp_path, BY_HAND)
    normalised = run_json(capsys, tree, *config)
    assert normalised[1]["advantage"] == pytest.approx(1, abs=1e-6)
    overridden = run_json(capsys, tree, *config, "--set", "algorithm.advantage=difference")
    assert overridden[1]["advantage"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "algorithm.advantag=difference"], "nearest known one is 'advantage'"),
        (["--set", "algoritm.advantage=difference"], "nearest known one is 'algorithm'"),
        (["--set", "algorithm.advantage=other"], "algorithm.advantage: "),
        (["--set", "algorithm.mask_threshold=2"], "algorithm.mask_threshold: "),
        (["--set", "algorithm=3"], "algorithm: "),
        (["--set", "nonsense"], "write section.key=value"),
        (["--config", "none.toml"], "none.toml: No such file"),
        (["--set", "algorithm.name=ppo"], "critic"),
        (["--set", "algorithm.name=grpo"], 'plan {"kind": "group"}'),
        (["--set", "algorithm.name=vineppo"], "no value rollouts"),
        (["--tokenizer", "./none"], "no tokenizer in ./none"),
        (["--html", "none/page.html"], "--html none/page.html: No such file"),
    ],
)
def test_mistakes_in_arguments_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["inspect", save(tmp_path, BY_HAND), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("spoke inspect: ")
    assert said.count("\n") == 1


# --- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('[{}, {"parent": 0, "reward": NaN}]', "NaN is no number"),
        ('[{}, {"parent": 0, "reward": 1e999}]', "1e999 is too large"),
        ('"text"', 'no "nodes"'),
        ('{"detail": "an error"}', 'no "nodes"'),
        ("[]", "no nodes"),
        ('{"nodes": []}', "no nodes"),
        ("[[]]", "node 0: write an object"),
    ],
)
def test_what_is_no_tree(tmp_path, capsys, text, message):
    (tmp_path / "bad.json").write_text(text)
    assert main(["inspect", str(tmp_path / "bad.json")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "bad.json" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (changed(2, parent=9), "node 2: parent 9 is not there"),
        (changed(2, parent=4), "node 2: parent 4 does not come before it"),
        (changed(2, parent="1"), "node 2: parent '1' is not the id of a node"),
        (without(2, "parent"), "node 2: no parent"),
        (changed(0, parent=0), "node 0: "),
        (changed(2, id=7), "the node at position 2 has id 7"),
        (changed(2, depth=5), "node 2: depth is not its parent's plus one"),
        (changed(2, depth="1"), "node 2: depth: "),
        (changed(0, role="segment"), "node 0: the first node"),
        (changed(3, role="prompt"), "node 3: the first node"),
        (changed(1, role="rollout"), "node 2: its parent 1 is a rollout"),
        (changed(3, role="segmet"), "node 3: role: "),
        (changed(3, reward="1"), "node 3: reward: "),
        (changed(3, reward=True), "node 3: reward: "),
        (changed(3, reward=None), "node 3: a leaf without a reward"),
        (without(4, "reward"), "node 4: a leaf without a reward"),
        (changed(3, token_ids=["14"]), "node 3: token_ids.0: "),
        (changed(1, logprobs=[-1]), "node 1: 1 logprobs for 2 tokens"),
        (changed(1, logprobs=[-1, 0.9]), "node 1: logprobs[1] is 0.9; a log-probability is at most 0"),
        (changed(1, versions=[[3, 1]]), "node 1: version spans"),
        (changed(4, rewards=1), "node 4: unknown field 'rewards'; the nearest known one is 'reward'"),
        (without(4, "logprobs"), "node 4: no logprobs, .*mask_threshold=null"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_tree_names_the_node(nodes, message):
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ConfigError, match=pattern) as raised:
        inspected(nodes)
    assert "\n" not in str(raised.value)


def test_logprobs_may_miss_where_no_mask_reads_them():
    found = inspected(without(4, "logprobs"), mask_threshold=None)
    assert found.as_json()[3]["participates"] == [True]
    dropped = [
        node | {"reward": 1} if "reward" in node else node for node in without(4, "logprobs")
    ]
    assert inspected(dropped).totals()["trained segments"] == 0


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    for path in ("none.json", str(tmp_path), str(tmp_path / "bytes.json")):
        assert main(["inspect", path]) == 2
        assert capsys.readouterr().err.startswith(f"spoke inspect: {path}: ")


def test_standard_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"nodes": BY_HAND})))
    assert len(run_json(capsys, "-")) == 4


# --- the terminal


def styles(nodes, texts=None, **settings):
    """style -> text shown in it."""
    inspection = inspected(nodes, **settings)
    shown: dict[str, str] = {}
    waiting = [draw(inspection, texts or {})]
    while waiting:
        branch = waiting.pop(0)
        waiting += branch.children
        for span in branch.label.spans:
            part = branch.label.plain[span.start : span.end]
            shown[str(span.style)] = shown.get(str(span.style), "") + part
    return shown


def test_tokens_are_coloured_by_what_they_get():
    texts = {1: ["a", "b"], 2: ["c"], 3: ["d"], 4: ["\x1b[31m\n"]}
    shown = styles(BY_HAND, texts, mask_threshold=0.95)
    assert shown[LOWERED] == "a"
    assert shown[RAISED] == "␛[31m⏎c"
    assert "b" in shown[MASKED]
    assert "d" in shown[MASKED]


def test_without_tokens_told_apart_segments_are_coloured():
    shown = styles(BY_HAND)
    assert (shown[LOWERED], shown[RAISED]) == ("ab", "c")


def test_the_terminal_shows_numbers_text_and_colours():
    stream = io.StringIO()
    console = Console(file=stream, width=160, force_terminal=True, color_system="standard")
    console.print(render(inspected(CHAIN, name="spo_chain"), {}))
    shown = stream.getvalue()
    assert "\x1b[1;4;32m" in shown
    assert "\x1b[1;4;31m" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    for text in ("V 0.500 of 2 rollouts", "V 1.000", "A -1.000", "1/1", "3 value rollouts"):
        assert text in plain


def test_a_long_chain_and_a_deep_tree_are_shown():
    chain = [{}, *({"parent": i} for i in range(2000)), {"parent": 2000, "reward": 1}]
    comb = [{}, {"parent": 0}, {"parent": 0, "reward": 0}]
    for deepest in range(1, 400, 2):
        comb += [{"parent": deepest}, {"parent": deepest, "reward": deepest}]
    comb[-2]["reward"] = 1
    for nodes in (chain, comb):
        inspection = inspected(nodes)
        console = Console(file=io.StringIO(), width=2000)
        console.print(render(inspection, {}))
        assert len(re.findall(r" A [+-]\d", console.file.getvalue())) == len(nodes) - 1
        assert page(inspection, {}, title="t").count('class="row"') == len(nodes) - 1


# --- the page


class Page(HTMLParser):
    """What a browser would see: tags that open and close in turn, text, and nothing that runs or loads."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&</span></details>"


def test_the_page_is_whole_escaped_and_needs_nothing_else():
    nodes = [one | {"text": f"{one['text']} {HOSTILE}"} for one in BY_HAND]
    nodes[3]["reward_error"] = HOSTILE
    chain = [one | {"text": HOSTILE} for one in CHAIN]
    envelope = {"request_id": HOSTILE, "model": HOSTILE, "server_id": HOSTILE}
    for tree, name in ((nodes, "spo_tree"), (chain, "spo_chain")):
        saved = parse(json.dumps({"nodes": tree} | envelope))
        inspection = inspect(saved, AlgorithmSettings(name=name))
        told_apart = {
            i: [HOSTILE] * len(n["logprobs"]) for i, n in enumerate(tree) if "logprobs" in n
        }
        for texts in ({}, told_apart):
            seen = Page(page(inspection, texts, title=HOSTILE))
            assert not seen.open
            assert not {tag for tag, _ in seen.tags} & {"script", "img", "link", "iframe", "object"}
            for _, attributes in seen.tags:
                assert not [a for a in attributes if a.startswith("on") or a in ("src", "href")]
            assert seen.text.count(HOSTILE) >= len(tree)
    assert "url(" not in page(inspection, {}, title="t")
    assert "default-src 'none'" in page(inspection, {}, title="t")


def test_the_page_shows_every_text_value_and_token(tmp_path, capsys):
    saved = parse(json.dumps({"nodes": BY_HAND, "weight_versions": {"min": 3, "max": 4}}))
    written = page(inspect(saved, AlgorithmSettings()), {1: ["a", "b"]}, title="My tree")
    seen = Page(written)
    for text in ("How many?", "My tree", "V 0.750", "A -0.250", "A +0.500", "1/2", "3-4", "40.0 %"):
        assert text in seen.text
    tokens = [a for tag, a in seen.tags if "title" in a and a["title"].startswith("token ")]
    assert [(a["class"], a["title"]) for a in tokens] == [
        ("t p", "token 11 · probability 0.5 · trains"),
        ("t", "token 12 · probability 0.95 · masked"),
        ("p", "token 13 · probability 0.5 · trains"),
        ("", "token 14 · probability 0.95 · masked"),
        ("", "token 15 · probability 0.9 · masked"),
    ]
    strengths = re.findall(r'id="n(\d)" style="--s:([0-9.]+);', written)
    assert strengths == [("1", "0.500"), ("2", "1.000"), ("3", "1.000"), ("4", "0.500")]
    assert main(["inspect", save(tmp_path, BY_HAND), "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == ""
    assert html.escape("How many?") in (tmp_path / "page.html").read_text("utf-8")


# --- tokens


def test_pieces_of_a_character_go_to_the_token_that_completes_it():
    parts = {1: "€"[:1].encode()[:2], 2: "€".encode()[2:], 3: b"!"}

    def decode(ids):
        return b"".join(parts[i] for i in ids).decode("utf-8", "replace")

    assert list(pieces(decode, [3], [1, 2, 3])) == ["", "€", "!"]
    assert list(pieces(decode, [], [])) == []


def test_texts_of_another_tokenizer_are_not_cut():
    saved = parse(json.dumps(BY_HAND))
    letters = {11: "a", 12: "b", 13: "wrong", 14: "d", 15: "e"}
    found = token_texts(saved, lambda ids: "".join(letters[i] for i in ids))
    assert found == {1: ["a", "b"], 3: ["d"], 4: ["e"]}
    assert token_texts(saved, None) == {}
    textless = [{k: v for k, v in node.items() if k != "text"} for node in BY_HAND]
    assert token_texts(parse(json.dumps(textless)), None)[1] == ["11 ", "12 "]


def answer() -> RolloutTreeResponse:
    """An answer as a server of the quickstart's model would give it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WARMSTART)
    texts = ["Ben has 9 apples.\n", "Ben starts", " with 9.\n#### 9", " with 8.\n#### 8"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    nodes = [
        {
            "id": i, "parent": None if i == 0 else min(1, i - 1), "depth": min(2, i), "text": texts[i],
            "role": "segment" if i else "prompt", "token_ids": ids[i],
            "logprobs": [-0.01, *[-1.5] * (len(ids[i]) - 1)] if i else None,
            "versions": [[2, len(ids[i])]] if i else [], "finish_reason": "stop" if i > 1 else None,
            "reward": {2: 1.0, 3: 0.0}.get(i),
        }
        for i in range(4)
    ]  # fmt: skip
    return RolloutTreeResponse.model_validate(
        {
            "request_id": "q", "server_id": "s", "model": str(WARMSTART), "nodes": nodes,
            "usage": {"prompt_tokens": 1, "sampled_tokens": 1, "computed_prefill_tokens": 1, "cached_tokens": 0},
            "weight_versions": {"min": 2, "max": 2}, "timing": {"queue_s": 0, "sample_s": 0, "reward_s": 0},
        }
    ).with_values()  # fmt: skip


def test_a_servers_answer_is_shown_token_by_token(tmp_path, capsys):
    (tmp_path / "answer.json").write_text(answer().model_dump_json(indent=1))
    tree = str(tmp_path / "answer.json")
    found = run_json(capsys, tree)
    assert [one["advantage"] for one in found] == [0.0, 0.5, -0.5]
    assert [set(one["participates"][1:]) for one in found] == [{False}, {True}, {True}]
    assert main(["inspect", tree, "--html", str(tmp_path / "page.html")]) == 0
    seen = Page((tmp_path / "page.html").read_text("utf-8"))
    for text in ("Ben starts", " with 9.\n#### 9", " with 8.\n#### 8"):
        assert text in seen.text
    titles = [a["title"] for _, a in seen.tags if a.get("title", "").startswith("token ")]
    assert len(titles) == sum(len(one["participates"]) for one in found)
    assert titles[-1].endswith("version 2 · trains")
    assert main(["inspect", tree, "--tokenizer", str(WARMSTART)]) == 0
    assert "#### 8" in capsys.readouterr().out


def test_a_decoder_gives_back_what_was_sampled():
    decode = load_decoder(str(WARMSTART))
    ids = answer().nodes[2].token_ids
    assert "".join(pieces(decode, answer().nodes[1].token_ids, ids)) == " with 9.\n#### 9"
