"""Twins of the trainer's computations, written from the definitions in plain Python, and random trees.

Nothing here calls what it is compared with.
"""

import math
import os

from hypothesis import settings
from hypothesis import strategies as st

from shared.tree import RolloutTree

examples = settings(
    max_examples=int(os.environ.get("SPOKE_EXAMPLES", "200")), deadline=None, derandomize=True
)
"""The same examples on every run, so that a failure is everyone's; SPOKE_EXAMPLES asks for more of them."""


def make_tree(
    parents,
    counts,
    rewards,
    *,
    prompt=(5, 6, 7),
    token_ids=None,
    logprobs=None,
    finish=None,
    request_id="q",
):
    """A tree from one entry per node below the prompt: parent, token count, reward (of leaves)."""
    depth, root = [0], {"id": 0, "parent": None, "depth": 0, "role": "prompt"}
    nodes = [root | {"token_ids": list(prompt)}]
    with_children = set(parents)
    for i, (parent, count, reward) in enumerate(zip(parents, counts, rewards, strict=True), 1):
        depth.append(depth[parent] + 1)
        given = logprobs[i - 1] if logprobs else [-1.0 - 0.01 * i] * count
        own = token_ids[i - 1] if token_ids else [2 + (37 * i + 11 * t) % 340 for t in range(count)]
        nodes.append(
            {
                "id": i,
                "parent": parent,
                "depth": depth[i],
                "token_ids": own,
                "logprobs": list(given),
                "versions": [[3, count]] if count else [],
                "finish_reason": finish[i - 1] if finish else "stop",
                "reward": None if i in with_children else reward,
            }
        )
    return RolloutTree.model_validate({"request_id": request_id, "nodes": nodes})


@st.composite
def trees(draw, max_nodes=12, branched=True):
    """Random trees of up to 12 nodes: segments of 0 to 4 tokens, rewards from -2 to 2, many of them equal."""
    n = draw(st.integers(1, max_nodes))
    parents = [draw(st.integers(0, i if branched else 0)) for i in range(n)]
    counts = [draw(st.integers(0, 4)) for _ in range(n)]
    reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1]), st.floats(-2, 2))
    rewards = [draw(reward) for _ in range(n)]
    logprob = st.one_of(st.sampled_from([0.0, math.log(0.9), -0.5]), st.floats(-8, 0))
    logprobs = [[draw(logprob) for _ in range(count)] for count in counts]
    return make_tree(parents, counts, rewards, logprobs=logprobs)


@st.composite
def chains(draw, max_responses=3, max_segments=4, prompt_rollouts=None):
    """Random chain plans: up to 4 segments a response, 0 to 4 tokens each, 1 to 3 rollouts a boundary.

    prompt_rollouts: whether the prompt is a boundary; None draws it.
    """
    nodes = [{"id": 0, "parent": None, "depth": 0, "role": "prompt", "token_ids": [5, 6]}]
    reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1]), st.floats(-2, 2))
    logprob = st.one_of(st.sampled_from([0.0, math.log(0.9), -0.5]), st.floats(-8, 0))

    def add(parent, role, **fields):
        count = draw(st.integers(0, 4))
        own = {
            "id": len(nodes), "parent": parent, "depth": nodes[parent]["depth"] + 1, "role": role,
            "token_ids": [2 + (37 * len(nodes) + 11 * t) % 340 for t in range(count)],
            "logprobs": [draw(logprob) for _ in range(count)],
            "versions": [[3, count]] if count else [],
        }  # fmt: skip
        nodes.append(own | fields)
        return own["id"]

    def add_rollouts(parent):
        for _ in range(draw(st.integers(1, 3))):
            finish = draw(st.sampled_from(["stop", "stop", "length", "abort"]))
            add(parent, "rollout", finish_reason=finish, reward=draw(reward))

    if draw(st.booleans()) if prompt_rollouts is None else prompt_rollouts:
        add_rollouts(0)
    for _ in range(draw(st.integers(1, max_responses))):
        parent = 0
        for _ in range(draw(st.integers(0, max_segments - 1))):
            parent = add(parent, "segment", finish_reason="length")
            add_rollouts(parent)
        finish = draw(st.sampled_from(["stop", "stop", "length", "abort"]))
        add(parent, "segment", finish_reason=finish, reward=draw(reward))
    return RolloutTree.model_validate({"request_id": "q", "nodes": nodes})


def chain_value(tree, node_id):
    """V of a state in a chain by looking at every node; None where nothing is known."""
    below = [
        node.reward
        for node in tree.nodes
        if node.parent == node_id and node.role == "rollout" and node.finish_reason != "abort"
    ]
    if below:
        return math.fsum(below) / len(below)
    return tree.nodes[node_id].reward


def chain_advantage(tree, node_id):
    """A of one segment; None where it has none."""
    node = tree.nodes[node_id]
    ends = not any(other.parent == node_id for other in tree.nodes)
    if node.role != "segment" or not node.token_ids or (ends and node.finish_reason == "abort"):
        return None
    after, before = chain_value(tree, node_id), chain_value(tree, node.parent)
    return 0.0 if after is None or before is None else after - before


def gae(values, reward, gamma, lam):
    """Generalised advantages by their definition, a double sum."""
    size = len(values)

    def delta(t):
        following = values[t + 1] if t + 1 < size else 0.0
        return (reward if t == size - 1 else 0.0) + gamma * following - values[t]

    return [sum((gamma * lam) ** (k - t) * delta(k) for k in range(t, size)) for t in range(size)]


def value(tree, node_id):
    """V by recursion."""
    children = [node.id for node in tree.nodes if node.parent == node_id]
    if not children:
        return tree.nodes[node_id].reward
    return sum(value(tree, child) for child in children) / len(children)


def population_std(numbers):
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))


def tree_advantage(tree, node_id, *, normalised):
    parent = tree.nodes[node_id].parent
    difference = value(tree, node_id) - value(tree, parent)
    if not normalised:
        return difference
    siblings = [value(tree, node.id) for node in tree.nodes if node.parent == parent]
    return 0.0 if abs(difference) < 1e-9 else difference / (population_std(siblings) + 1e-8)


def grpo(rewards):
    mean = sum(rewards) / len(rewards)
    std = population_std(rewards)
    return [0.0 if abs(r - mean) < 1e-9 else (r - mean) / (std + 1e-8) for r in rewards]


def rloo(rewards):
    out = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        out.append(reward - (sum(others) / len(others) if others else 0.0))
    return out


def whiten(values, counted):
    """Unbiased; zeros where there are fewer than two to count."""
    chosen = [v for v, c in zip(values, counted, strict=True) if c]
    if len(chosen) < 2:
        return [0.0] * len(values)
    mean = math.fsum(chosen) / len(chosen)
    variance = math.fsum((v - mean) ** 2 for v in chosen) / (len(chosen) - 1)
    return [(v - mean) / math.sqrt(variance + 1e-8) for v in values]


def token_loss(logprob, behaviour, advantage, ref, *, low, high, kl_coef, kl):
    """(loss, its derivative by logprob) of one token, the derivative by hand."""
    raw = logprob - behaviour
    log_ratio = max(-10.0, min(10.0, raw))
    ratio = math.exp(log_ratio)
    slope = ratio if -10 <= raw <= 10 else 0.0
    clipped = max(1 - low, min(1 + high, ratio))
    if -advantage * clipped > -advantage * ratio:
        loss, gradient = -advantage * clipped, 0.0
    else:
        loss, gradient = -advantage * ratio, -advantage * slope
    if ref is not None:
        d = ref - logprob
        if kl == "k1":
            term, term_gradient = -d, 1.0
        elif kl == "k2":
            term, term_gradient = d * d / 2, -d
        elif kl == "k3":
            bounded = max(-10.0, min(10.0, d))
            term = math.exp(bounded) - bounded - 1
            term_gradient = 1 - math.exp(d) if -10 <= d <= 10 else 0.0
        else:
            term, term_gradient = 0.0, 0.0
        loss, gradient = loss + kl_coef * term, gradient + kl_coef * term_gradient
    return loss, gradient


def rate(peak, warm, total, floor, decay, step):
    """The schedule, branch by branch."""
    if step < warm:
        return peak * (step + 1) / warm
    if decay == "constant":
        return peak
    share = 1.0 if step >= total else (step - warm) / (total - warm)
    left = 1 - share if decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * share)
    return peak * floor + peak * (1 - floor) * left
