"""Is a tree what its request asked for? Every rule written down once more, apart from the server that made it.

What is taken from the product is its models of the wire and the `gsm8k` reward, called on text decoded here.
A fault is a line of text; a tree without faults gives none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.rewards.gsm8k import gsm8k
from shared.tree import FinishReason, Node, Role
from shared.wire import (
    ChainPlan,
    GroupPlan,
    RolloutTreeRequest,
    RolloutTreeResponse,
    TreePlan,
)
from tests.benchmarks.load_parts.chain_checks import check_chain

CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known of the server from elsewhere."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    """Without special tokens."""
    ends: frozenset[int]
    context: int
    """Most tokens of prompt plus response."""
    versions: frozenset[int] = frozenset({0})
    """Weight versions that the server has held."""


def faults(request: RolloutTreeRequest, tree: RolloutTreeResponse, truth: Truth) -> list[str]:
    """What is wrong with a tree; nothing where it is right.

    Args:
        request: what was asked; its prompt is a text, and it has no stop strings and no savings.
        tree: the answer.
        truth: about the server.
    """
    look = Look(request, tree.nodes, truth)
    look.shape()
    if look.found:  # what is below reads paths
        return look.found
    for node in tree.nodes[1:]:
        look.tokens(node)
    if isinstance(request.plan, ChainPlan):
        check_chain(look, request.plan)
    else:
        look.branching(request.plan)
    look.rewards()
    look.values()
    look.texts()
    look.usage(tree)
    return look.found


@dataclass(slots=True)
class Look:
    """One tree under the checks; `found` gathers its faults."""

    request: RolloutTreeRequest
    nodes: list[Node]
    truth: Truth
    found: list[str] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    below: list[list[Node]] = field(default_factory=list)
    """[N] children of each node."""
    ends_at: list[list[int]] = field(default_factory=list)
    """[N] response tokens from the prompt's end to each node's end."""

    def fault(self, node: Node | None, text: str) -> None:
        """Note a fault."""
        self.found.append(text if node is None else f"node {node.id}: {text}")

    def is_(self, holds: bool, node: Node | None, text: str) -> None:
        """Note a fault where something does not hold."""
        if not holds:
            self.fault(node, text)

    def shape(self) -> None:
        """Ids, parents and depths: one tree, written depth first."""
        self.prompt = self.truth.encode(self.request.prompt or "")
        root, path = self.nodes[0], [0]
        plain = (root.logprobs, root.finish_reason, root.reward, root.reward_error, root.parent)
        self.is_(plain == (None,) * 5 and not root.versions, root, "it is more than a prompt")
        self.is_(root.role is Role.PROMPT and root.depth == 0, root, "it is not the prompt")
        self.is_(root.token_ids == self.prompt, root, "its tokens are not the prompt's")
        self.below, self.ends_at = [[] for _ in self.nodes], [[] for _ in self.nodes]
        for position, node in enumerate(self.nodes):
            self.is_(node.id == position, node, f"it stands at {position}")
            if position == 0:
                continue
            if node.parent not in path:
                self.fault(node, f"its parent {node.parent} is not on the path {path} before it")
                return
            path = [*path[: path.index(node.parent) + 1], position]
            self.is_(node.depth == len(path) - 1, node, f"depth {node.depth}, not {len(path) - 1}")
            self.below[node.parent].append(node)
            self.ends_at[position] = self.ends_at[node.parent] + node.token_ids

    def tokens(self, node: Node) -> None:
        """Tokens, logprobs, versions and how a node ended."""
        count, ends = len(node.token_ids), self.truth.ends
        self.is_(count > 0, node, "it has no tokens")
        logprobs = node.logprobs or []
        self.is_(len(logprobs) == count, node, f"{len(logprobs)} logprobs for {count} tokens")
        sound = all(math.isfinite(logprob) and logprob <= 0 for logprob in logprobs)
        self.is_(sound, node, "a logprob that is above 0 or not finite")
        spans = node.versions
        self.is_(sum(n for _, n in spans) == count, node, "version spans do not cover its tokens")
        tidy = all(n > 0 for _, n in spans) and {v for v, _ in spans} <= self.truth.versions
        self.is_(tidy, node, f"versions {spans}")
        self.is_(not ends & {*node.token_ids[:-1]}, node, "tokens behind an end token")
        ended = FinishReason.STOP if {*node.token_ids[-1:]} & ends else FinishReason.LENGTH
        self.is_(node.finish_reason is ended, node, f"{node.finish_reason}, but by tokens {ended}")

    def before(self, node: Node) -> list[int]:
        """Response tokens before a node."""
        assert node.parent is not None
        return self.ends_at[node.parent]

    def left(self, before: Sequence[int]) -> int:
        """Tokens that a response may still have, by its own limit and the context's."""
        room = self.truth.context - len(self.prompt)
        return min(self.request.sampling.max_tokens, room) - len(before)

    def fills(self, node: Node, limit: int) -> None:
        """A node stops before its limit by an end token alone."""
        count, cut = len(node.token_ids), node.finish_reason is FinishReason.LENGTH
        fits = count == limit if cut else count <= limit
        self.is_(fits, node, f"{count} tokens ({node.finish_reason}) where {limit} are the limit")

    def branching(self, plan: TreePlan | GroupPlan) -> None:
        """As many children as the plan says, each as long as it may be."""
        factors = plan.branch_factors if isinstance(plan, TreePlan) else [plan.samples]
        for node in self.nodes:
            children, depth = self.below[node.id], node.depth
            live = node.parent is None or (
                node.finish_reason is FinishReason.LENGTH and self.left(self.ends_at[node.id]) > 0
            )
            due = factors[depth] if live and depth < len(factors) else 0
            self.is_(len(children) == due, node, f"{len(children)} children, not {due}")
            limit = self.left(self.ends_at[node.id])
            if isinstance(plan, TreePlan) and depth < len(factors) - 1:
                limit = min(limit, plan.segment_tokens)
            for child in children:
                self.is_(child.role is Role.SEGMENT, child, f"its role is {child.role}")
                self.fills(child, limit)

    def rewards(self) -> None:
        """The reward of each leaf, from the text of its whole response; none elsewhere."""
        reward = self.request.reward
        for node in self.nodes[1:]:
            self.is_(node.reward_error is None, node, f"reward_error {node.reward_error!r}")
            due: float | None = None
            if reward is not None and not self.below[node.id]:
                if node.finish_reason is FinishReason.LENGTH:
                    due = float(reward.options.get("unfinished", 0.0))
                else:
                    text = self.truth.decode(self.ends_at[node.id])
                    due = gsm8k(text, reward.reference, {})
            self.is_(node.reward == due, node, f"reward {node.reward}, not {due}")

    def values(self) -> None:
        """Means of the children's values; in a chain of the rollouts' rewards."""
        chain = isinstance(self.request.plan, ChainPlan)
        for node in self.nodes:
            below = self.below[node.id]
            if chain:
                parts = [child.reward for child in below if child.role is Role.ROLLOUT]
            else:
                parts = [child.value for child in below]
            known = [part for part in parts if part is not None]
            due = sum(known) / len(known) if known else node.reward
            same = node.value == due or (
                None not in (node.value, due) and abs((node.value or 0) - (due or 0)) <= CLOSE
            )
            self.is_(same, node, f"value {node.value}, not {due}")

    def texts(self) -> None:
        """Texts along a path are the text of its tokens."""
        if not self.request.return_text:
            self.is_(all(node.text is None for node in self.nodes), None, "texts nobody asked for")
            return
        self.is_(self.nodes[0].text == self.truth.decode(self.prompt), self.nodes[0], "its text")
        texts = [""] * len(self.nodes)
        for node in self.nodes[1:]:
            texts[node.id] = texts[node.parent or 0] + (node.text or "")
            whole = self.truth.decode(self.ends_at[node.id])
            # A character that two nodes share has no one place.
            if "\ufffd" not in texts[node.id] + whole:
                self.is_(
                    texts[node.id] == whole, node, f"text {node.text!r} does not end {whole!r}"
                )

    def usage(self, tree: RolloutTreeResponse) -> None:
        """Tokens add up: sampled ones over the nodes, prompt ones over the engine's requests."""
        usage = tree.usage
        self.is_(usage.prompt_tokens == len(self.prompt), None, f"{usage}: prompt tokens")
        once = self.once()
        sampled = sum(len(node.token_ids) for node in once)
        self.is_(usage.sampled_tokens == sampled, None, f"{usage}: {sampled} were sampled")
        if self.request.sampling.temperature > 0:  # equal greedy samples may be sampled once
            read = sum(
                len(self.prompt) + len(self.before(node))
                for node in once
                if node.role is Role.ROLLOUT
                or node.parent == 0
                or not isinstance(self.request.plan, ChainPlan)
            )
            counted = usage.computed_prefill_tokens + usage.cached_tokens
            self.is_(counted == read, None, f"{usage}: the prompts of its requests have {read}")
        held = [version for node in self.nodes for version, _ in node.versions]
        span = (tree.weight_versions.min, tree.weight_versions.max)
        self.is_(span == (min(held), max(held)), None, f"weight_versions {span}")
        asked = self.request.request_id
        self.is_(asked in (None, tree.request_id), None, f"request_id {tree.request_id!r}")
        times = (tree.timing.queue_s, tree.timing.sample_s, tree.timing.reward_s)
        self.is_(all(0 <= s < math.inf for s in times), None, f"timing {times}")

    def once(self) -> list[Node]:
        """Nodes that were sampled: rollouts that stand below several nodes count once."""
        found: list[Node] = []
        states: dict[tuple[int, ...], int] = {}
        for node in self.nodes[1:]:
            if node.role is Role.ROLLOUT:
                state = tuple(self.before(node))
                if states.setdefault(state, node.parent or 0) != (node.parent or 0):
                    continue
            found.append(node)
        return found
