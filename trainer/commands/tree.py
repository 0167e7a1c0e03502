"""`spoke tree`: one tree in the terminal, with text, value and advantage of each segment."""

import argparse
import asyncio

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from shared.errors import ConfigError
from shared.tree import FinishReason, Node
from shared.wire import (
    Message,
    Reward,
    RolloutTreeRequest,
    RolloutTreeResponse,
    Sampling,
    TreePlan,
)
from trainer.commands.eval import fleet_of

ENDS = {FinishReason.STOP: " [dim]■[/dim]", FinishReason.ABORT: " [red]aborted[/red]"}
"""How a node's end is shown; one that was cut at its limit goes on below, or shows nothing."""


def run(args: argparse.Namespace) -> int:
    """Ask for one tree and print it."""
    answer = asyncio.run(_ask(_request(args), args))
    console = Console()
    if args.json:
        print(answer.model_dump_json(indent=1))
        return 0
    console.print(draw(answer))
    usage = answer.usage
    console.print(
        f"{answer.server_id}, weight version {answer.weight_versions.max}: {usage.sampled_tokens} tokens sampled, "
        f"{usage.computed_prefill_tokens} prefilled, {usage.cached_tokens} reused, {answer.timing.sample_s:.2f} s",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _request(args: argparse.Namespace) -> RolloutTreeRequest:
    try:
        factors = [int(part) for part in args.branch_factors.split(",")]
    except ValueError:
        raise ConfigError(
            f"--branch-factors {args.branch_factors}: write numbers such as 4,2,2"
        ) from None
    prompt = args.prompt.replace("\\n", "\n")
    try:
        return RolloutTreeRequest(
            prompt=None if args.chat else prompt,
            messages=[Message(role="user", content=prompt)] if args.chat else None,
            plan=TreePlan(branch_factors=factors, segment_tokens=args.segment_tokens),
            sampling=Sampling(
                temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed
            ),
            reward=None
            if args.reference is None
            else Reward(name=args.reward, reference=args.reference),
        )
    except ValueError as error:
        raise ConfigError(f"the request cannot be made: {error}") from None


async def _ask(request: RolloutTreeRequest, args: argparse.Namespace) -> RolloutTreeResponse:
    async with fleet_of(args, timeout_s=60.0) as fleet:
        return await fleet.rollout_tree(request)


def draw(answer: RolloutTreeResponse) -> Tree:
    """The tree with each segment's value V and advantage A = V - V(parent)."""
    nodes = answer.nodes
    drawn = [Tree(f"[bold]{escape(nodes[0].text or '')}[/bold]  {_value(nodes[0])}")]
    for node in nodes[1:]:
        assert node.parent is not None, "only the first node has no parent"
        drawn.append(drawn[node.parent].add(_label(node, nodes[node.parent])))
    return drawn[0]


def _value(node: Node) -> str:
    return "" if node.value is None else f"[cyan]V={node.value:.3f}[/cyan]"


def _label(node: Node, parent: Node) -> str:
    text = escape((node.text or "").replace("\n", "⏎"))
    end = {"stop": " [dim]■[/dim]", "abort": " [red]aborted[/red]"}.get(
        node.finish_reason or "", ""
    )
    error = f" [red]{escape(node.reward_error)}[/red]" if node.reward_error else ""
    if node.value is None or parent.value is None:
        return f"{text}{end}{error}"
    advantage = node.value - parent.value
    colour = "green" if advantage > 0 else "red" if advantage < 0 else "dim"
    return f"{text}{end}  {_value(node)} [{colour}]A={advantage:+.3f}[/{colour}]{error}"
