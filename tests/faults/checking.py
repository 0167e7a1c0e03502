"""Is a tree whole: of its plan's shape, every token stamped, nothing twice, versions that only grow?"""

import math

from shared.tree import FinishReason
from shared.wire import RolloutTreeRequest, RolloutTreeResponse, TreePlan


def check_tree(tree: RolloutTreeResponse, request: RolloutTreeRequest) -> None:
    """Compare a tree with what was asked for.

    Args:
        tree: the answer; its own model has checked ids, depths and spans already.
        request: of plan `tree` with a reward and without savings.
    """
    plan = request.plan
    assert isinstance(plan, TreePlan)
    assert tree.request_id == request.request_id
    factors, limit = plan.branch_factors, request.sampling.max_tokens
    for node in tree.nodes:
        children = [tree.nodes[child] for child in tree.children[node.id]]
        if node.parent is not None:
            assert len(node.token_ids) == len(node.logprobs or ()) > 0
            assert sum(count for _, count in node.versions) == len(node.token_ids)
            if node.depth < len(factors):
                assert len(node.token_ids) <= plan.segment_tokens
        length = len(tree.response_token_ids(node.id))
        assert length <= limit
        ended = node.finish_reason is FinishReason.STOP or length == limit
        branches = 0 if ended or node.depth == len(factors) else factors[node.depth]
        assert len(children) == branches, f"node {node.id} at depth {node.depth}"
        if children:
            mean = sum(child.value or 0.0 for child in children) / len(children)
            assert math.isclose(node.value or 0.0, mean, abs_tol=1e-9)
        else:
            assert ended
            assert node.reward is not None
    check_versions(tree, request)
    every = sum(len(node.token_ids) for node in tree.nodes[1:])
    assert tree.usage.given_tokens + tree.usage.sampled_tokens == every


def check_versions(tree: RolloutTreeResponse, request: RolloutTreeRequest) -> None:
    """Nothing older than was asked for, and from prompt to leaf no step back to older weights."""
    for leaf in tree.leaves():
        spans = [version for node in tree.path(leaf.id) for version, _ in node.versions]
        assert spans == sorted(spans), f"leaf {leaf.id}: {spans}"
    every = [version for node in tree.nodes for version, _ in node.versions]
    assert (min(every), max(every)) == (tree.weight_versions.min, tree.weight_versions.max)
    assert min(every) >= request.min_weight_version
