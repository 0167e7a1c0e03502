"""A tree as the trainer sees it, for the terminal: numbers, and text coloured by what each token gets."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from rich.console import Group
from rich.text import Text
from rich.tree import Tree

from shared.tree import FinishReason
from trainer.inspection import Inspection, SegmentView
from trainer.token_text import printable

RAISED = "bold underline green"
LOWERED = "bold underline red"
KEPT = "bold underline"
MASKED = "dim"
VALUE = "cyan"
ENDS = {FinishReason.STOP: (" ■", MASKED), FinishReason.ABORT: (" aborted", "red")}


def render(inspection: Inspection, texts: Mapping[int, Sequence[str]]) -> Group:
    """Header, tree, totals and legend.

    Args:
        inspection: of the tree.
        texts: [T] text of each token, by node; segments that are not in it are coloured whole.
    """
    totals = inspection.totals()
    share = totals["participating tokens"] / max(1, totals["tokens"])
    counted = Text(
        f"{totals['participating tokens']:,} of {totals['tokens']:,} tokens participate ({100 * share:.1f} %), "
        f"in {totals['trained segments']} of {totals['segments']} segments"
        + (f"; {totals['rollouts']} value rollouts" if totals["rollouts"] else "")
        + (f"; {totals['failed rewards']} rewards failed" if totals["failed rewards"] else "")
    )
    legend = Text.assemble(
        ("made likelier", RAISED), "  ", ("made less likely", LOWERED), "  ",
        ("masked or dropped", MASKED), "   V value, A advantage, k/T participating tokens",
    )  # fmt: skip
    return Group(Text(headline(inspection), style="bold"), draw(inspection, texts), counted, legend)


def headline(inspection: Inspection) -> str:
    """The settings that matter, in one line."""
    settings = inspection.settings
    mask = "off" if settings.mask_threshold is None else f"p < {settings.mask_threshold:g}"
    kind = f", {settings.advantage}" if settings.name == "spo_tree" else ""
    dropped = "dropped" if settings.drop_zero else "kept"
    return f"{settings.name}{kind}; probability mask {mask}; segments without advantage {dropped}"


def draw(inspection: Inspection, texts: Mapping[int, Sequence[str]]) -> Tree:
    """The tree itself; segments that follow each other without a choice stand below each other."""
    root = inspection.tree.nodes[0]
    drawn = Tree(_line(Text(_one_line(root.text or "prompt"), style="bold"), 0, inspection))
    waiting = [(drawn, inspection.children(0))]
    while waiting:
        branch, children = waiting.pop()
        for child in children:
            stretch = inspection.stretch(child)
            lines = [_segment(inspection, i, texts.get(i)) for i in stretch]
            waiting.append((branch.add(Text("\n").join(lines)), inspection.children(stretch[-1])))
    return drawn


def _line(text: Text, node_id: int, inspection: Inspection) -> Text:
    value = inspection.values[node_id]
    rollouts = inspection.rollouts(node_id)
    number = "" if value is None else f"  V {value:.3f}"
    estimate = f" of {len(rollouts)} rollouts" if rollouts else ""
    return Text.assemble(text, (number, VALUE), (estimate, MASKED))


def _segment(inspection: Inspection, node_id: int, texts: Sequence[str] | None) -> Text:
    view = inspection.segments[node_id]
    node = view.node
    value = "V   -  " if view.value is None else f"V {view.value:5.3f}"
    sign = "green" if view.advantage > 0 else "red" if view.advantage < 0 else MASKED
    count = f"{view.participating}/{len(view.participates)}" if view.participates else "no tokens"
    rollouts = inspection.rollouts(node_id)
    line = Text.assemble(
        (value, VALUE), " ", (f"A {view.advantage:+.3f}", sign), " ", (f"{count:>6}", MASKED), "  ",
        _text(view, texts),
        ENDS.get(node.finish_reason, "") if node.finish_reason else "",
        (f"  ({len(rollouts)} rollouts)", MASKED) if rollouts else "",
    )  # fmt: skip
    if node.reward_error:
        line.append(f"  {_one_line(node.reward_error)}", style="red")
    return line


def _text(view: SegmentView, texts: Sequence[str] | None) -> Text:
    style = RAISED if view.advantage > 0 else LOWERED if view.advantage < 0 else KEPT
    if texts is None:
        trains = any(view.participates) or (not view.participates and view.advantage != 0)
        return Text(_one_line(view.node.text or ""), style=style if trains else MASKED)
    shown = Text()
    tokens = zip(view.participates, texts, strict=True)
    for takes_part, alike in groupby(tokens, key=itemgetter(0)):
        joined = "".join(text for _, text in alike)
        shown.append(_one_line(joined), style=style if takes_part else MASKED)
    return shown


def _one_line(text: str) -> str:
    return printable(text.replace("\n", "⏎"))
