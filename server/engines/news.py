"""News of rows that are watched: their callers start new requests from where a row has been, while it goes on."""

from collections.abc import Iterable, Sequence
from functools import partial

from server.engines.base import News
from server.engines.jobs import Job, Sample
from server.engines.kv import RowCache
from server.engines.prefixes import PrefixStore
from server.engines.rows import Rows

STEPS = 8
"""From one piece of news of a row to the next: what a caller waits, against what telling costs."""


class Watch:
    """Rows whose callers want to know how they grow.

    Args:
        rows: what is sampled.
        cache: keys and values of the rows.
        store: keeps keys and values for other rows.
    """

    def __init__(self, rows: Rows, cache: RowCache, store: PrefixStore) -> None:
        self._rows, self._cache, self._store = rows, cache, store
        self._watched: list[int] = []

    def over(self, rows: Sequence[int]) -> None:
        """Watch these of the rows that run, and no others, where their callers ask for news."""
        self._watched = [row for row in rows if self._at(row).job.tell is not None]

    def step(self, steps: int) -> None:
        """Tell what is new, at every `STEPS`-th step."""
        if self._watched and steps % STEPS == 0:
            self._tell()

    def _tell(self) -> None:
        """Hand over what the rows have sampled since the last time."""
        rows, watched = self._rows, self._watched
        lengths: list[int] = rows.length[watched].tolist()
        told = [len(self._at(row).prompt) + self._at(row).told for row in watched]
        first = min(told)
        tokens = rows.tokens[watched, first : max(lengths)].tolist()
        logprobs = rows.logprobs[watched, first : max(lengths)].tolist()
        news: dict[Job, list[News]] = {}
        for at, row in enumerate(watched):
            current, new = self._at(row), slice(told[at] - first, lengths[at] - first)
            current.told = lengths[at] - len(current.prompt)
            grown = News(
                sample=current.index, token_ids=tokens[at][new], logprobs=logprobs[at][new]
            )
            news.setdefault(current.job, []).append(grown)
        for job, grown_samples in news.items():
            assert job.tell is not None, "only rows of jobs that ask for news are watched"
            job.tell(grown_samples)

    def keep(self, prompts: Iterable[tuple[int, ...]], new: Sequence[int]) -> None:
        """Keep the keys and values of prompts that a row has passed, before they are looked for.

        A row leaves its keys and values when it ends, which is too late for those whom its news made ask.

        Args:
            prompts: of rows that start now.
            new: these rows.
        """
        watched = [row for row in self._watched if row not in new]
        if not watched:
            return
        lengths: list[int] = self._rows.length[watched].tolist()
        paths = self._rows.tokens[watched, : max(lengths)].tolist()
        for prompt in prompts:
            known = list(prompt[:-1])
            for row, length, path in zip(watched, lengths, paths, strict=True):
                # A row's last token was never an input: it has no keys and values yet.
                if len(known) < length and path[: len(known)] == known:
                    self._store.put(known, partial(self._cache.read, row))
                    break

    def _at(self, row: int) -> Sample:
        current = self._rows.samples[row]
        assert current is not None, "only rows that run are watched"
        return current
