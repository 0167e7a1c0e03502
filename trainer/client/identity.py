"""What makes two requests the same: the question, for routing; id and seed, for a retry."""

import hashlib
import uuid

from shared.wire import RolloutTreeRequest


def question_key(request: RolloutTreeRequest) -> bytes:
    """Equal for requests that ask the same question, whatever their plan and sampling.

    >>> from shared.wire import GroupPlan
    >>> asked = [("a", 1), ("a", 2), ("b", 1)]
    >>> one, two, other = (RolloutTreeRequest(prompt=p, plan=GroupPlan(samples=n)) for p, n in asked)
    >>> question_key(one) == question_key(two), question_key(one) == question_key(other)
    (True, False)
    """
    asked = request.model_dump_json(include={"prompt", "messages", "prompt_token_ids"})
    return hashlib.blake2b(asked.encode(), digest_size=16).digest()


def repeatable(request: RolloutTreeRequest, *, seeded: bool) -> RolloutTreeRequest:
    """The same request with an id.

    Args:
        request: what is asked.
        seeded: with a seed made of the id, too: every server then samples the same tree.

    >>> from shared.wire import GroupPlan
    >>> plain = RolloutTreeRequest(request_id="r", prompt="1", plan=GroupPlan(samples=1))
    >>> asked = repeatable(plain, seeded=True)
    >>> asked == repeatable(asked, seeded=True), asked.request_id, asked.sampling.seed
    (True, 'r', 3661043325300291388)
    """
    request_id = request.request_id or uuid.uuid4().hex
    seed = request.sampling.seed
    if seed is None and seeded:
        seed = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest()) >> 2
    sampling = request.sampling.model_copy(update={"seed": seed})
    return request.model_copy(update={"request_id": request_id, "sampling": sampling})
