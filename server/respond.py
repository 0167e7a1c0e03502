"""A finished tree into the response that its caller asked for."""

import asyncio
from typing import Any

from starlette.responses import Response

from shared.codec import MediaType, compress, encode, wants_zstd
from shared.wire import RolloutTreeResponse

OFF_LOOP_TOKENS = 32_768
"""A tree of this many tokens is encoded in a thread: about 1 MB of JSON, 3 ms."""

CONTENT: dict[str, Any] = {
    MediaType.JSON: {},
    MediaType.MSGPACK: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": "The same tree in packed columns: the layout is in shared/codec.py.",
        }
    },
    MediaType.NDJSON: {
        "schema": {
            "type": "string",
            "description": "A line for each node as it finishes, then one for the rest: shared/stream.py.",
        }
    },
}
"""OpenAPI's `content` of the forms; JSON's schema is the route's model."""


async def tree_response(
    tree: RolloutTreeResponse, media: MediaType, accept_encoding: str | None
) -> Response:
    """The tree as one body.

    Args:
        tree: the answer.
        media: JSON or msgpack.
        accept_encoding: the request's `Accept-Encoding`. JSON is compressed by zstd for who names it; msgpack's
            arrays are compressed already.
    """
    zstd = media is MediaType.JSON and wants_zstd(accept_encoding)

    def body() -> bytes:
        encoded = encode(tree, media)
        return compress(encoded) if zstd else encoded

    large = sum(len(node.token_ids) for node in tree.nodes) >= OFF_LOOP_TOKENS
    headers = {"Vary": "Accept, Accept-Encoding"} | ({"Content-Encoding": "zstd"} if zstd else {})
    content = await asyncio.to_thread(body) if large else body()
    return Response(content, media_type=media, headers=headers)
