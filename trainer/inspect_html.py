"""A tree as the trainer sees it, as one page that needs nothing else: no script, no font, no network.

Everything from the tree is escaped, and the page forbids itself scripts and outside resources on top of that:
what a model wrote stays text.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from shared.tree import FinishReason, Node
from trainer.inspection import Inspection, SegmentView
from trainer.token_text import printable

STYLE = files("trainer") / "inspect.css"

NEWLINE = "\n"
OPEN_NODES = 100
"""Larger trees start with their deeper subtrees folded."""

LEGEND = """<div class="legend">
<span class="seg up" style="--s:1"><span class="t p">made likelier</span></span>
<span class="seg down" style="--s:1"><span class="t p">made less likely</span></span>
<span class="seg up" style="--s:1"><span class="t">masked, in a segment that trains</span></span>
<span class="seg off"><span class="t">dropped: no advantage</span></span>
<span class="note">The stronger the colour, the larger the advantage.
Point at a token for its id, probability and version.</span>
<label><input type="checkbox" id="focus"> only what trains</label></div>"""


def page(inspection: Inspection, texts: Mapping[int, Sequence[str]], *, title: str) -> str:
    """The whole page.

    Args:
        inspection: of the tree.
        texts: [T] text of each token, by node; other segments show their text whole above a strip of tokens.
        title: what the page is called.
    """
    root = inspection.tree.nodes[0]
    value = inspection.values[0]
    prompt = "" if value is None else f'<span class="v">V {value:.3f}</span>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)} · spoke inspect</title>\n<style>{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{_facts(inspection)}\n{_totals(inspection)}\n{LEGEND}\n</header>\n"
        f'<main>\n<div class="prompt"><span class="label">prompt {prompt}</span>'
        f'<div class="text">{_shown(root.text or "(no text)")}</div>{_rollouts(inspection, 0)}</div>\n'
        f"{''.join(_tree(inspection, texts))}</main>\n</body>\n</html>\n"
    )


def _facts(inspection: Inspection) -> str:
    settings, saved = inspection.settings, inspection.saved
    mask = settings.mask_threshold
    facts = {
        "algorithm": str(settings.name),
        "advantage": str(settings.advantage) if settings.name == "spo_tree" else None,
        "probability mask": "off" if mask is None else f"p < {mask:g}",
        "segments without advantage": "dropped" if settings.drop_zero else "kept",
        "overlong buffer": f"{settings.overlong_buffer} tokens"
        if settings.overlong_buffer
        else None,
        "request": inspection.tree.request_id or None,
        "model": saved.model,
        "server": saved.server,
        "weight version": saved.versions,
    }
    listed = (
        f"<div><dt>{name}</dt><dd>{_shown(text)}</dd></div>" for name, text in facts.items() if text
    )
    return f'<dl class="facts">{"".join(listed)}</dl>'


def _totals(inspection: Inspection) -> str:
    totals = inspection.totals()
    tokens, segments = totals["tokens"], totals["segments"]
    taking_part, trained = totals["participating tokens"], totals["trained segments"]
    share = taking_part / max(1, tokens)
    cards = [
        (f"{100 * share:.1f} %", f"{taking_part:,} of {tokens:,} tokens participate"),
        (f"{trained:,}", f"of {segments:,} segments train"),
        (f"{totals['leaves']:,}", "responses"),
    ]
    if totals["rollouts"]:
        cards.append((f"{totals['rollouts']:,}", "value rollouts"))
    if totals["failed rewards"]:
        cards.append((f"{totals['failed rewards']:,}", "rewards failed"))
    shown = (
        f'<div class="card"><b>{number}</b><span>{text}</span></div>' for number, text in cards
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _tree(inspection: Inspection, texts: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """The segments below the prompt, depth first; a list of what is still to be written, in place of recursion."""
    folded = len(inspection.tree.nodes) > OPEN_NODES
    waiting: list[str | int] = [*reversed(inspection.children(0))]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
            continue
        stretch = inspection.stretch(item)
        below = inspection.children(stretch[-1])
        rows = [_row(inspection, node_id, texts.get(node_id)) for node_id in stretch]
        extra = [_rollouts(inspection, node_id) for node_id in stretch]
        following = zip(rows[1:], extra[1:], strict=True)
        rest = "".join(f'<div class="leaf">{row}</div>{more}\n' for row, more in following)
        if not (rest or extra[0] or below):
            yield f'<div class="leaf">{rows[0]}</div>\n'
            continue
        opened = "" if folded and inspection.tree.nodes[item].depth > 1 else " open"
        yield f"<details{opened}><summary>{rows[0]}</summary>{extra[0]}\n{rest}"
        yield '<div class="below">\n' if below else ""
        waiting.append("</div></details>\n" if below else "</details>\n")
        waiting += below[::-1]


def _row(inspection: Inspection, node_id: int, texts: Sequence[str] | None) -> str:
    view = inspection.segments[node_id]
    sign = "up" if view.advantage > 0 else "down" if view.advantage < 0 else "off"
    value = "-" if view.value is None else f"{view.value:.3f}"
    size = abs(view.advantage) / inspection.largest_advantage
    low, high = inspection.value_range
    share = 0.0 if view.value is None else 100 * (view.value - low) / (high - low)
    count = f"{view.participating}/{len(view.participates)}" if view.participates else "no tokens"
    stop = " stop" if view.node.finish_reason is FinishReason.STOP else ""
    return (
        f'<span class="row" id="n{node_id}" style="--s:{size:.3f};--v:{share:.0f}%">'
        f'<span class="v" title="value of node {node_id}">V {value}</span>'
        f'<span class="a {sign}" title="advantage">A {view.advantage:+.3f}</span>'
        f'<span class="k" title="tokens that take part">{count}</span>'
        f'<span class="text"><span class="seg {sign}{stop}">{_text(view, texts)}</span>'
        f"{_end(inspection, view.node, texts)}</span></span>"
    )


def _text(view: SegmentView, texts: Sequence[str] | None) -> str:
    titles = _titles(view)
    if texts is not None:
        return "".join(
            f'<span class="t{" p" if takes_part else ""}{" n" if NEWLINE in text else ""}" '
            f'title="{title}">{_shown(text)}</span>'
            for text, takes_part, title in zip(texts, view.participates, titles, strict=True)
        )
    trains = any(view.participates) or not view.participates
    cells = "".join(
        f'<i class="{"p" if takes_part else ""}" title="{title}"></i>'
        for takes_part, title in zip(view.participates, titles, strict=True)
    )
    strip = f'<span class="strip">{cells}</span>' if cells else ""
    return (
        f'<span class="whole{" p" if trains else ""}">{_shown(view.node.text or "")}</span>{strip}'
    )


def _titles(view: SegmentView) -> Iterator[str]:
    """What pointing at each token shows."""
    node = view.node
    versions = [version for version, count in node.versions for _ in range(count)]
    for position, takes_part in enumerate(view.participates):
        logprobs = node.logprobs
        probability = f"probability {math.exp(logprobs[position]):.4g}" if logprobs else ""
        version = f"version {versions[position]}" if versions else ""
        state = "trains" if takes_part else "masked" if view.trained else "dropped"
        parts = (f"token {node.token_ids[position]}", probability, version, state)
        yield " · ".join(part for part in parts if part)


def _end(inspection: Inspection, node: Node, texts: Sequence[str] | None) -> str:
    leaf = not inspection.tree.children[node.id]
    parts = []
    # An end token without text is marked where it stands.
    marked = bool(texts is not None and texts and not texts[-1])
    if node.finish_reason is FinishReason.STOP and not marked:
        parts.append('<span class="end" title="ended by itself">■</span>')
    elif node.finish_reason is FinishReason.ABORT:
        parts.append('<span class="tag bad">aborted</span>')
    elif leaf and node.finish_reason is FinishReason.LENGTH:
        parts.append('<span class="tag">unfinished</span>')
    if leaf and node.reward is not None:
        parts.append(f'<span class="tag">reward {node.reward:g}</span>')
    if node.reward_error:
        parts.append(f'<span class="tag bad">{_shown(node.reward_error)}</span>')
    return "".join(parts)


def _rollouts(inspection: Inspection, node_id: int) -> str:
    """The Monte Carlo rollouts from a node's end, folded."""
    rollouts = inspection.rollouts(node_id)
    if not rollouts:
        return ""
    listed = "".join(
        f'<li><span class="tag">reward {"-" if node.reward is None else f"{node.reward:g}"}</span> '
        f'<span class="text">{_shown(node.text or "")}</span></li>'
        for node in rollouts
    )
    value = inspection.values[node_id]
    mean = "" if value is None else f", mean reward {value:.3f}"
    return (
        f'<details class="rollouts"><summary>{len(rollouts)} rollouts from here{mean}</summary>'
        f"<ul>{listed}</ul></details>"
    )


def _shown(text: str) -> str:
    return escape(printable(text, keep="\n\t"))
