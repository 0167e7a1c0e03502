"""Lines of an answer: in any order they make the tree that JSON gives, and bad ones are an error of ours."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import MediaType, decode, encode
from shared.errors import RequestError, TreeError
from shared.stream import (
    Assembler,
    ErrorLine,
    NodeLine,
    RestartLine,
    TreeLine,
    dump,
    lines,
    node_keys,
)
from shared.wire import Problem, RolloutTreeResponse
from tests.shared.test_codec import tree
from tests.shared.trees import answers, examples


def assembled(sent: list[str]) -> RolloutTreeResponse:
    assembler = Assembler()
    for line in sent[:-1]:
        assert isinstance(assembler.feed(line), NodeLine)
        assert not assembler.ended
    last = assembler.feed(sent[-1].encode())
    assert assembler.ended
    assert isinstance(last, RolloutTreeResponse)
    return last


@examples
@given(made=answers(), data=st.data())
def test_lines_in_any_order_make_the_tree_that_json_gives(
    made: RolloutTreeResponse, data: st.DataObject
) -> None:
    *nodes, last = lines(made)
    got = assembled([*data.draw(st.permutations(nodes)), last])
    assert got == made == decode(encode(made, MediaType.JSON), MediaType.JSON)
    assert got.model_dump_json() == made.model_dump_json()


@examples
@given(made=answers())
def test_each_line_is_one_json_object_that_says_what_it_is(made: RolloutTreeResponse) -> None:
    sent = list(lines(made))
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in sent)
    assert [json.loads(line)["kind"] for line in sent] == ["node"] * len(made.nodes) + ["tree"]
    assert NodeLine.model_validate_json(sent[0]).key == ""
    assert TreeLine.model_validate_json(sent[-1]).order == node_keys([n.parent for n in made.nodes])


@examples
@given(made=answers(), data=st.data())
def test_a_node_that_is_missing_or_comes_twice_is_refused(
    made: RolloutTreeResponse, data: st.DataObject
) -> None:
    *nodes, last = lines(made)
    one = data.draw(st.integers(0, len(nodes) - 1))
    with pytest.raises(TreeError, match="never came"):
        assembled([*nodes[:one], *nodes[one + 1 :], last])
    with pytest.raises(TreeError, match="came twice"):
        assembled([*nodes, nodes[one], last])


def changed(line: str, **fields: Any) -> str:
    return json.dumps(json.loads(line) | fields)


LAST = [
    ({"order": ["0", ""]}, "has no parent"),
    ({"order": ["", "1"]}, "never came"),
    ({"order": [""], "rewards": [None], "reward_errors": [None], "values": [None]}, "not in the tree"),
    ({"order": ["", ""]}, "twice"),
    ({"order": []}, "order"),
    ({"order": ["", "01"]}, r"order\.1"),
    ({"rewards": [None]}, "are not of 2 nodes"),
    ({"server_id": None}, "server_id"),
    ({"pickle": 1}, "pickle"),
    ({"kind": "forest"}, "kind|tag"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), LAST)
def test_a_last_line_that_fits_no_tree_is_refused(fields: dict[str, Any], message: str) -> None:
    *nodes, last = lines(tree([7, 8], [-0.5, -0.25]))
    with pytest.raises(TreeError, match=message):
        assembled([*nodes, changed(last, **fields)])


NODE = [
    ({"logprobs": [-0.5]}, "1 logprobs for 2 tokens"),
    ({"versions": [[0, 3]]}, "do not add up"),
    ({"depth": 2}, "depth is not its parent's"),
    ({"key": "1"}, "never came"),
]


@pytest.mark.parametrize(("fields", "message"), NODE)
def test_nodes_that_make_no_tree_are_refused(fields: dict[str, Any], message: str) -> None:
    prompt, node, last = lines(tree([7, 8], [-0.5, -0.25]))
    with pytest.raises(TreeError, match=message):
        assembled([prompt, changed(node, **fields), last])


def test_siblings_stand_at_their_positions() -> None:
    prompt, node, last = lines(tree([7, 8], None))
    with pytest.raises(TreeError, match="siblings"):
        assembled([prompt, changed(node, key="1"), changed(last, order=["", "1"])])


def test_nothing_follows_the_last_line() -> None:
    assembler = Assembler()
    *nodes, last = lines(tree([7], None))
    for line in [*nodes, last]:
        assembler.feed(line)
    with pytest.raises(TreeError, match="after the last"):
        assembler.feed(nodes[0])


def test_an_error_line_is_raised_with_its_status() -> None:
    problem = Problem(title="Not ready", status=503, detail="the engine is dead")
    assembler = Assembler()
    with pytest.raises(RequestError, match="the engine is dead") as caught:
        assembler.feed(dump(ErrorLine(problem=problem)))
    assert caught.value.status == 503
    assert assembler.ended


@examples
@given(line=st.binary() | st.text())
def test_noise_is_an_error_of_ours(line: bytes | str) -> None:
    with pytest.raises(TreeError):
        Assembler().feed(line)


@examples
@given(made=answers(), data=st.data())
def test_damaged_lines_are_an_error_of_ours_or_another_tree(
    made: RolloutTreeResponse, data: st.DataObject
) -> None:
    body = bytearray("".join(lines(made)).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    assembler = Assembler()
    try:
        for line in bytes(body).split(b"\n")[:-1]:
            got = assembler.feed(line)
    except TreeError:
        return
    if isinstance(got, RolloutTreeResponse):
        assert RolloutTreeResponse.model_validate(got.model_dump()) == got


def test_a_tree_that_is_begun_anew_has_the_nodes_after_that_line_alone() -> None:
    old, whole, assembler = tree([5], [-2.0]), tree([7, 8], [-0.5, -0.25]), Assembler()
    prompt, node, _ = lines(old)
    for line in (prompt, node, node.replace('"key":"0"', '"key":"1"')):
        assembler.feed(line)
    assert assembler.feed(dump(RestartLine(version=4))) == RestartLine(version=4)
    assert [assembler.feed(line) for line in lines(whole)][-1] == whole
