"""A question into a tree request."""

import hashlib

from shared.wire import Message, Plan, Reward, RolloutTreeRequest, Sampling, Savings
from trainer.data import Question
from trainer.settings import DataSettings, InFlight, RewardSettings


def tree_request(
    question: Question,
    *,
    data: DataSettings,
    reward: RewardSettings,
    plan: Plan,
    temperature: float,
    max_tokens: int,
    name: str,
    seed: int | None,
    savings: Savings | None = None,
    min_weight_version: int = 0,
    in_flight: InFlight = InFlight.CONTINUE,
    text: bool = False,
) -> RolloutTreeRequest:
    """The request of one question's tree.

    Args:
        question: what is asked, and the reference answer.
        data: how a question becomes a prompt.
        reward: which function grades.
        plan: the tree's shape.
        temperature: of sampling; 0 is greedy.
        max_tokens: bound of a response.
        name: of the occasion, such as `run/3f2a/step-7`: with the question's id it makes the request's id, so
            that a retry gets the same tree.
        seed: of the occasion; with the question's id it makes the tree's seed. None for a tree without one.
        savings: early decisions; None for none.
        min_weight_version: lowest version that may sample it.
        in_flight: what becomes of it while new weights reach its server.
        text: whether nodes carry their text.
    """
    prompt = data.prompt.replace("{question}", question.text)
    digest = hashlib.blake2b(f"{seed}/{question.id}".encode(), digest_size=8).digest()
    own_seed = None if seed is None else int.from_bytes(digest, "big") >> 2
    return RolloutTreeRequest(
        request_id=f"{name}/{question.id}",
        prompt=None if data.chat else prompt,
        messages=[Message(role="user", content=prompt)] if data.chat else None,
        plan=plan,
        sampling=Sampling(temperature=temperature, max_tokens=max_tokens, seed=own_seed),
        reward=Reward(name=reward.name, reference=question.reference, options=reward.options),
        savings=savings or Savings(),
        min_weight_version=min_weight_version,
        in_flight=in_flight.value,
        return_text=text,
    )
