"""The forms of an answer: what comes out equals what went in, and bad bytes are an error of ours.

1. JSON and msgpack give back any tree, exactly; msgpack's arrays are no wider than their values need.
2. A tree of real size weighs at most a fifth of its JSON.
3. Bytes that are damaged, cut off, too long or made up are a TreeError, without an allocation that they ask for.
4. `Accept` and `Accept-Encoding` are read as RFC 9110 says.
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import MediaType, choose, compress, decode, decompress, encode, wants_zstd
from shared.errors import RequestError, TreeError
from shared.packed import PackedNumbers
from shared.tree import Node, Role
from shared.wire import RolloutTreeResponse, Timing, Usage, WeightVersions
from tests.shared.trees import answers, examples

ROOT = Path(__file__).resolve().parents[2]
WHOLE = [MediaType.JSON, MediaType.MSGPACK]


def tree(token_ids: list[int], logprobs: list[float] | None, text: str = "") -> RolloutTreeResponse:
    return RolloutTreeResponse(
        request_id="r", server_id="s", model="m",
        nodes=[
            Node(id=0, parent=None, depth=0, role=Role.PROMPT, token_ids=[1, 2]),
            Node(id=1, parent=0, depth=1, token_ids=token_ids, logprobs=logprobs, text=text, reward=1.0),
        ],
        usage=Usage(prompt_tokens=2, sampled_tokens=2, computed_prefill_tokens=2, cached_tokens=0),
        weight_versions=WeightVersions(min=0, max=0),
        timing=Timing(queue_s=0.0, sample_s=0.1, reward_s=0.0),
    )  # fmt: skip


def packed(made: RolloutTreeResponse) -> dict[str, Any]:
    document = msgpack.unpackb(encode(made, MediaType.MSGPACK))
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("media", WHOLE)
@examples
@given(made=answers())
def test_1_what_comes_out_is_what_went_in(media: MediaType, made: RolloutTreeResponse) -> None:
    decoded = decode(encode(made, media), media)
    assert decoded == made
    assert decoded.model_dump_json() == made.model_dump_json()  # -0.0, 1 and 1.0, the types too
    assert decoded.model_fields_set == RolloutTreeResponse.model_fields.keys()


@pytest.mark.parametrize(
    ("ids", "number", "width"),
    [
        ([], "u16", 2),
        ([0, 65_535], "u16", 2),
        ([65_536], "u24", 3),
        ([2**24 - 1], "u24", 3),
        ([2**24], "u32", 4),
        ([2**32], "i64", 8),
        ([-1], "i64", 8),
    ],
)
def test_1_token_ids_take_the_fewest_bytes(ids: list[int], number: str, width: int) -> None:
    made = tree(ids, None)
    array = packed(made)["nodes"]["token_ids"]
    assert array["type"] == number
    assert zstandard.frame_content_size(array["data"]) == width * (2 + len(ids))
    assert decode(encode(made, MediaType.MSGPACK), MediaType.MSGPACK) == made


@pytest.mark.parametrize(
    ("value", "number"),
    [(-0.5, "f32"), (float(np.float32(-0.1)), "f32"), (-0.1, "f64"), (-1e300, "f64"), (-1e-45, "f64"),
     (-float("inf"), "f32")],
)  # fmt: skip
def test_1_logprobs_are_float32_where_that_is_exact(value: float, number: str) -> None:
    made = tree([5], [value])
    assert packed(made)["nodes"]["logprobs"]["type"] == number
    assert decode(encode(made, MediaType.MSGPACK), MediaType.MSGPACK) == made


@pytest.mark.parametrize("id_", [2**63, -(2**63) - 1])
def test_1_what_does_not_fit_is_refused(id_: int) -> None:
    with pytest.raises(TreeError, match="64 bits"):
        encode(tree([id_], None), MediaType.MSGPACK)


def test_2_a_real_tree_weighs_a_fifth_of_its_json(gsm8k: Path) -> None:
    lines = (gsm8k / "train.jsonl").read_text().splitlines()[:600]
    text = "\n".join(json.loads(line)["answer"] for line in lines)
    generator = np.random.default_rng(0)
    pieces = re.findall(r" ?[^\W\d_]+|\d|\W|_", text)  # much as a large tokenizer cuts it
    numbers = {piece: 70_000 + number for number, piece in enumerate(dict.fromkeys(pieces))}
    ids = [numbers[piece] for piece in pieces]
    logprobs = np.log(generator.beta(5, 0.4, len(ids)).clip(1e-9)).astype(np.float32)
    made = tree(ids, logprobs.tolist(), "".join(pieces))
    sizes = [len(encode(made, media)) for media in (MediaType.MSGPACK, MediaType.JSON)]
    assert sizes[0] <= sizes[1] / 5


@examples
@given(made=answers(), data=st.data())
def test_3_damaged_bytes_are_an_error_of_ours_or_another_tree(
    made: RolloutTreeResponse, data: st.DataObject
) -> None:
    body = bytearray(encode(made, MediaType.MSGPACK))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(body), MediaType.MSGPACK)
    except TreeError:
        return
    assert RolloutTreeResponse.model_validate(decoded.model_dump()) == decoded


@pytest.mark.parametrize("media", WHOLE)
@examples
@given(made=answers(), data=st.data())
def test_3_every_cut_is_an_error_of_ours(
    media: MediaType, made: RolloutTreeResponse, data: st.DataObject
) -> None:
    body = encode(made, media)
    with pytest.raises(TreeError):
        decode(body[: data.draw(st.integers(0, len(body) - 1))], media)
    with pytest.raises(TreeError):
        decode(body + b"1", media)


@pytest.mark.parametrize("media", WHOLE)
@examples
@given(body=st.binary())
def test_3_noise_is_an_error_of_ours(media: MediaType, body: bytes) -> None:
    with pytest.raises(TreeError):
        decode(body, media)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@examples
@given(made=answers(), data=st.data())
def test_3_made_up_fields_are_an_error_of_ours_or_another_tree(
    made: RolloutTreeResponse, data: st.DataObject
) -> None:
    document = packed(made)
    inside = data.draw(
        st.sampled_from([document, document["nodes"], document["nodes"]["token_ids"]])
    )
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(_VALUES)
    try:
        decoded = decode(msgpack.packb(document), MediaType.MSGPACK)
    except TreeError:
        return
    assert RolloutTreeResponse.model_validate(decoded.model_dump()) == decoded


BROKEN = [
    ("parents", [None, 5], "does not come before it"),
    ("parents", [None], "columns of"),
    ("depths", [0, 2], "depth is not its parent's"),
    ("depths", [0, -1], r"nodes\.depths\.1"),
    ("roles", ["prompt", "judge"], r"nodes\.roles\.1"),
    ("token_counts", [2, 1], "3 token ids, and the nodes have 2|4 token ids, and the nodes have 3"),
    ("token_counts", [2, 2**62], "token ids"),
    ("token_counts", [5, -1], r"nodes\.token_counts"),
    ("has_logprobs", [True, True], "logprobs, and the nodes have"),
    ("versions", [[], [[0, 1]]], "do not add up"),
    ("text_bytes", [None, 1], "texts of 1 bytes"),
    ("text_bytes", [None, 2**62], "texts of"),
    ("token_ids", {"type": "f32", "data": compress(b"")}, "token ids are integers"),
    ("token_ids", {"type": "u24", "data": compress(b"1234")}, "no whole number"),
    ("token_ids", {"type": "u16", "data": b"1234"}, "zstd"),
    ("token_ids", {"type": "object", "data": compress(b"")}, r"nodes\.token_ids\.type"),
    ("pickle", b"", r"nodes\.pickle"),
]


@pytest.mark.parametrize(("field", "value", "message"), BROKEN)
def test_3_an_error_names_what_is_wrong(field: str, value: Any, message: str) -> None:
    document = packed(tree([7, 8], [-0.5, -0.25], "ab"))
    document["nodes"][field] = value
    with pytest.raises(TreeError, match=message):
        decode(msgpack.packb(document), MediaType.MSGPACK)


def test_3_another_layout_is_refused() -> None:
    document = packed(tree([7], None)) | {"format": 2}
    with pytest.raises(TreeError, match="format"):
        decode(msgpack.packb(document), MediaType.MSGPACK)


def test_3_a_bomb_is_refused_before_it_goes_off() -> None:
    claims = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    compressor = zstandard.ZstdCompressor(level=1).compressobj()  # does not say how much is inside
    hides = compressor.compress(bytes(1 << 26)) + compressor.flush()
    for frame in (claims, hides):
        with pytest.raises(TreeError, match="allowed"):
            decompress(frame, 1 << 20)
    assert decompress(hides, 1 << 26) == bytes(1 << 26)
    document = packed(tree([7], [-0.5]))
    document["nodes"]["logprobs"]["data"] = claims
    with pytest.raises(TreeError, match="allowed"):
        decode(msgpack.packb(document), MediaType.MSGPACK)
    with pytest.raises(TreeError, match="no whole number"):
        PackedNumbers(type="u16", data=hides).unpack(1 << 27)


def test_3_nested_claims_take_no_memory() -> None:
    """A million-element array in a million-element array in …: each header reserves what it claims."""
    program = (
        "import resource, sys\n"
        "from shared.codec import MediaType, decode\n"
        "from shared.errors import TreeError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "body = b'\\xdd\\x00\\x0f\\x00\\x00' * 400 + bytes(1 << 20)\n"
        "try: decode(body, MediaType.MSGPACK)\n"
        "except TreeError as error: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )  # fmt: skip
    assert int(run.stdout) < 200 * 1024, "KiB"


@examples
@given(body=st.binary(max_size=2000), cut=st.integers(0, 2000))
def test_3_zstd_gives_back_bytes_or_an_error_of_ours(body: bytes, cut: int) -> None:
    frame = compress(body)
    assert decompress(frame, len(body)) == body
    for bad in (frame[: min(cut, len(frame) - 1)], frame + b"x", body):
        with pytest.raises(TreeError):
            decompress(bad, 10_000)


ACCEPT = [
    (None, "json"),
    ("", "json"),
    ("*/*", "json"),
    ("application/*", "json"),
    ("application/msgpack", "msgpack"),
    ("APPLICATION/MsgPack", "msgpack"),
    ("application/x-ndjson", "x-ndjson"),
    ("application/msgpack, */*", "msgpack"),
    ("application/json, application/msgpack", "json"),
    ("application/msgpack, application/json", "msgpack"),
    ("application/msgpack;q=0.5, application/json;q=0.4", "msgpack"),
    ("application/msgpack;q=0.4, application/json; q=0.5", "json"),
    ("application/json;q=0, */*", "msgpack"),
    ("text/html, application/*;q=0.2, application/x-ndjson;q=0.3", "x-ndjson"),
    ("application/json;charset=utf-8", "json"),
    ("application/json;q=much, application/msgpack;q=0.1", "msgpack"),
]


@pytest.mark.parametrize(("accept", "media"), ACCEPT)
def test_4_accept(accept: str | None, media: str) -> None:
    assert choose(accept) == f"application/{media}"


@pytest.mark.parametrize(
    "accept", ["text/html", "application/json;q=0", "*/*;q=0", "application/x-ndjson"]
)
def test_4_nothing_acceptable_is_406(accept: str) -> None:
    with pytest.raises(RequestError, match="application/msgpack") as caught:
        choose(accept, WHOLE)
    assert (caught.value.status, caught.value.field) == (406, "Accept")


@pytest.mark.parametrize(
    ("header", "wanted"),
    [(None, False), ("", False), ("*", False), ("gzip", False), ("zstd", True), ("gzip, ZSTD;q=0.1", True),
     ("zstd;q=0, *", False), ("identity", False)],
)  # fmt: skip
def test_4_accept_encoding(header: str | None, wanted: bool) -> None:
    assert wants_zstd(header) is wanted
