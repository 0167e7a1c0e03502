"""A whole answer of `POST /rollout_tree` as bytes: JSON, or `application/msgpack` in packed columns.

The msgpack form has the JSON's fields, but nodes as columns: `nodes.parents` lists the parent of each node, and so
on. Token ids, log-probabilities and texts of all nodes stand one after another in one array each
(`shared/packed.py`), cut by `token_counts` and `text_bytes`. What is decoded equals what was encoded, to the last
bit of a float.

Bytes are untrusted: what does not decode is a `TreeError`, and no more is unpacked than a bound allows.
"""

from array import array
from collections.abc import Iterable
from itertools import accumulate, pairwise
from itertools import compress as chosen
from typing import Annotated, Any, Literal, Self

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from shared.errors import TreeError, TreeTooLargeError
from shared.media import MediaType, choose, wants_zstd
from shared.packed import PackedNumbers, pack_floats, pack_integers, pack_texts, unpack_texts
from shared.tree import FinishReason, Node, Role
from shared.wire import RolloutTreeResponse, Timing, Usage, WeightVersions, WireModel
from shared.zstd import compress, content_size, decompress

__all__ = [
    "LIMIT_BYTES",
    "MediaType",
    "choose",
    "compress",
    "decode",
    "decompress",
    "encode",
    "wants_zstd",
]

LIMIT_BYTES = 1 << 27
"""Most bytes of a tree's arrays and texts after decompression: some 15 million tokens."""
_Count = Annotated[int, Field(ge=0)]


class _Columns(WireModel):
    """[N] of each field of the nodes; a node's id is its position."""

    parents: list[int | None] = Field(min_length=1)
    depths: list[_Count]
    roles: list[Role]
    token_counts: list[_Count]
    token_ids: PackedNumbers
    has_logprobs: list[bool]
    logprobs: PackedNumbers
    versions: list[list[tuple[int, int]]]
    finish_reasons: list[FinishReason | None]
    text_bytes: list[_Count | None]
    text: bytes
    rewards: list[float | None]
    reward_errors: list[str | None]
    values: list[float | None]

    @model_validator(mode="after")
    def _columns_of_one_length(self) -> Self:
        columns = [value for _, value in self if isinstance(value, list)]
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"columns of {sorted(len(column) for column in columns)} nodes")
        if not self.token_ids.type.is_integer or self.logprobs.type.is_integer:
            raise ValueError("token ids are integers, logprobs are floats")
        for position, (spans, count) in enumerate(
            zip(self.versions, self.token_counts, strict=True)
        ):
            if spans and sum(tokens for _, tokens in spans) != count:
                raise ValueError(f"node {position}: version spans do not add up to its tokens")
        return self


class _PackedTree(WireModel):
    """The msgpack document."""

    format: Literal[1] = Field(
        description="Of this layout; another one would be read in another way."
    )
    request_id: str
    server_id: str
    model: str
    nodes: _Columns
    usage: Usage
    weight_versions: WeightVersions
    timing: Timing


def encode(tree: RolloutTreeResponse, media: MediaType) -> bytes:
    """The body of an answer.

    Args:
        tree: what to send.
        media: JSON or MSGPACK; lines are made by `shared/stream.py`.

    Raises:
        TreeError: an integer does not fit 64 bits.
    """
    match media:
        case MediaType.JSON:
            return tree.model_dump_json().encode()
        case MediaType.MSGPACK:
            return _encode_packed(tree)
        case MediaType.NDJSON:
            raise ValueError(f"{media} is no form of a whole body")


def decode(body: bytes, media: MediaType, *, limit_bytes: int = LIMIT_BYTES) -> RolloutTreeResponse:
    """The tree in a body.

    Args:
        body: untrusted bytes.
        media: JSON or MSGPACK.
        limit_bytes: most bytes that the arrays and texts of a MSGPACK body may have when unpacked.

    Raises:
        TreeError: the body is damaged, too large (TreeTooLargeError), or holds no tree.
    """
    try:
        match media:
            case MediaType.JSON:
                return RolloutTreeResponse.model_validate_json(body)
            case MediaType.MSGPACK:
                return _decode_packed(body, limit_bytes)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise TreeError(f"a {media} body that is no tree: {where}: {first['msg']}") from None
    raise ValueError(f"{media} is no form of a whole body")


def _encode_packed(tree: RolloutTreeResponse) -> bytes:
    nodes = tree.nodes
    text_bytes, text = pack_texts(node.text for node in nodes)
    columns = {
        "parents": [node.parent for node in nodes],
        "depths": [node.depth for node in nodes],
        "roles": [node.role for node in nodes],
        "token_counts": [len(node.token_ids) for node in nodes],
        "token_ids": pack_integers(_joined("q", (node.token_ids for node in nodes))).model_dump(),
        "has_logprobs": [node.logprobs is not None for node in nodes],
        "logprobs": pack_floats(_joined("d", (node.logprobs or [] for node in nodes))).model_dump(),
        "versions": [node.versions for node in nodes],
        "finish_reasons": [node.finish_reason for node in nodes],
        "text_bytes": text_bytes,
        "text": text,
        "rewards": [node.reward for node in nodes],
        "reward_errors": [node.reward_error for node in nodes],
        "values": [node.value for node in nodes],
    }
    document = {"format": 1, **tree.model_dump(exclude={"nodes"}), "nodes": columns}
    try:
        return bytes(msgpack.packb(document))
    except OverflowError as error:
        raise TreeError(f"a number that msgpack cannot carry: {error}") from None


def _joined(typecode: Literal["q", "d"], lists: Iterable[list[Any]]) -> NDArray[Any]:
    """All values of all lists; an `array` takes a list of Python numbers faster than numpy does."""
    joined = array(typecode)
    try:
        for values in lists:
            joined.fromlist(values)
    except OverflowError as error:
        raise TreeError(f"a token id that does not fit 64 bits: {error}") from None
    return np.asarray(joined)


def _decode_packed(body: bytes, limit_bytes: int) -> RolloutTreeResponse:
    try:
        document = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise TreeError(f"a body that is no msgpack: {error}") from None
    packed = _PackedTree.model_validate(document)
    nodes = _nodes(packed.nodes, limit_bytes)
    rest = {name: value for name, value in packed if name not in ("format", "nodes")}
    return RolloutTreeResponse(nodes=nodes, **rest)


def _nodes(columns: _Columns, limit_bytes: int) -> list[Node]:
    """The nodes, made without Node's own validation: columns and counts have been checked, and values come from
    typed arrays. Checking each of the values again takes most of the time of decoding.
    """
    frames = (columns.token_ids.data, columns.logprobs.data, columns.text)
    size = sum(content_size(frame) or 0 for frame in frames)
    if size > limit_bytes:
        raise TreeTooLargeError(f"a tree of {size} bytes, and {limit_bytes} are allowed")
    counts, has_logprobs = columns.token_counts, columns.has_logprobs
    tokens = _cut(columns.token_ids.unpack(limit_bytes), counts, "token ids")
    sampled = _cut(columns.logprobs.unpack(limit_bytes), chosen(counts, has_logprobs), "logprobs")
    texts = unpack_texts(columns.text_bytes, columns.text, limit_bytes)
    logprobs = iter(sampled)
    return [
        Node.model_construct(
            id=position, parent=columns.parents[position], depth=columns.depths[position],
            role=columns.roles[position], token_ids=tokens[position],
            logprobs=next(logprobs) if has_logprobs[position] else None,
            versions=columns.versions[position], finish_reason=columns.finish_reasons[position],
            text=texts[position], reward=columns.rewards[position],
            reward_error=columns.reward_errors[position], value=columns.values[position],
        )
        for position in range(len(tokens))
    ]  # fmt: skip


def _cut(values: list[Any], counts: Iterable[int], what: str) -> list[list[Any]]:
    """Values in runs of the given lengths, which must add up."""
    ends = [0, *accumulate(counts)]
    if ends[-1] != len(values):
        raise TreeError(f"{len(values)} {what}, and the nodes have {ends[-1]}")
    return [values[start:end] for start, end in pairwise(ends)]
