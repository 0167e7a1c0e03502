"""Continuous batching: every step decodes one token of each running row; rows come and go between steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count

import torch

from server.engines.base import ApplyReport
from server.engines.jobs import Job, Sample
from server.engines.kv import RowCache
from server.engines.model import LanguageModel
from server.engines.news import Watch
from server.engines.prefill import Prefill
from server.engines.prefixes import PrefixStore
from server.engines.rows import Rows
from server.engines.sampling import sample, uniforms
from server.engines.staging import Change, write
from server.engines.stops import StopStrings
from shared.tree import FinishReason


@dataclass(slots=True)
class Times:
    """Where the time of the steps went, in seconds."""

    steps: int = 0
    tokens: int = 0
    """Sampled."""
    prefill_s: float = 0.0
    """Looking prompts up, computing and copying them."""
    forward_s: float = 0.0
    sampling_s: float = 0.0
    bookkeeping_s: float = 0.0
    """Starting and ending rows, and keeping their keys and values."""


class Batch:
    """All requests of an engine; used from one thread, in inference mode.

    Args:
        model: samples.
        max_batch: most rows that run at once.
    """

    def __init__(self, model: LanguageModel, max_batch: int) -> None:
        self.version = 0
        self.times = Times()
        self._model = model
        self._max_batch = max_batch
        self._waiting: list[tuple[int, int, Sample]] = []
        """A heap of (priority, order of arrival, sample)."""
        self._arrivals = count()
        self._rows = Rows(max_batch, max(model.info.max_model_len, 2), model.device)
        self._cache = RowCache(model.shape, 1, 1, model.device)
        self._store = PrefixStore(model.cache_bytes)
        self._prefill = Prefill(model, self._cache, self._rows, self._store)
        self._watch = Watch(self._rows, self._cache, self._store)
        self._stops = StopStrings(model.tokenizer)
        self._ends = torch.zeros(model.info.vocab_size, dtype=torch.bool, device=model.device)
        self._ends[list(model.info.eos_token_ids)] = True
        self._changed()

    @property
    def sequences(self) -> int:
        """That run or wait; may be read from any thread."""
        return len(self._waiting) + self._rows.count

    @property
    def busy(self) -> bool:
        """Is there anything to sample?"""
        return self.sequences > 0

    @property
    def progress(self) -> int:
        """Passes through the model so far; grows while the thread works, also within one long step."""
        return self.times.steps + self._prefill.passes

    def enqueue(self, job: Job) -> None:
        """Line up all samples of a request."""
        for index in range(job.request.samples):
            entry = (job.request.priority, next(self._arrivals), Sample(job, index))
            heappush(self._waiting, entry)

    def cancel(self, job: Job) -> None:
        """Forget a request and free its rows."""
        self._waiting = [entry for entry in self._waiting if entry[2].job is not job]
        heapify(self._waiting)
        rows = self._rows
        rows.drop([row for row in rows.running() if self._at(row).job is job])
        self._changed()

    def fail(self, error: Exception) -> None:
        """Give every request the error."""
        running = [self._at(row) for row in self._rows.running()]
        waiting = [sample for _, _, sample in self._waiting]
        for job in {s.job for s in (*running, *waiting)}:
            job.fail(error)

    def check(self) -> None:
        """Run one token through the model, beside the batch.

        Raises:
            EngineError: its logits are not finite.
        """
        self._model.answers()

    def step(self) -> None:
        """Start what waits and fits, then sample one token of each row."""
        clock = time.perf_counter
        began = clock()
        self._admit()
        if self._rows.span > self._rows.count * 17 / 16:
            self._compact()
        admitted = clock()
        self._decode(admitted)
        self.times.prefill_s += admitted - began

    def swap(self, staged: Sequence[Change], version: int) -> ApplyReport:
        """Write new weights and compute every running row's keys and values anew with them.

        Raises:
            WeightsError: writing failed; the old weights are back.
        """
        began = time.perf_counter()
        write(staged)
        written = time.perf_counter()
        rows = self._rows
        running = rows.running()
        lengths = rows.length[: rows.span].tolist()
        for row in running:
            self._at(row).seal(lengths[row], self.version)
        self.version = version
        self._store.clear()
        # Afresh: what broken weights left behind, not-a-number, would leak through the mask.
        self._cache.resize(self._cache.rows, self._cache.capacity)
        self._prefill.prompts(self._by_prompt(running))
        starts = [len(self._at(row).prompt) - 1 for row in running]
        self._prefill.extend(running, starts, [lengths[row] - 1 for row in running])
        return ApplyReport(pause_s=time.perf_counter() - began, apply_s=written - began)

    def _decode(self, began: float) -> None:
        """One token of each row."""
        clock, rows, n = time.perf_counter, self._rows, self._rows.span
        length = rows.length[:n]
        position = length - 1
        pending = rows.tokens[:n].gather(1, position[:, None])[:, 0]
        logits = self._model.decode(self._cache, pending, position, self._extent)
        forwarded = clock()
        token, logprob = sample(
            logits,
            uniforms(rows.seed[:n], length - rows.start[:n]),
            rows.temperature[:n].float(),
            *((rows.top_k[:n], rows.top_p[:n]) if self._truncates else ()),
        )
        # A void row writes behind its only token and does not grow.
        rows.tokens[:n].scatter_(1, length[:, None], token[:, None])
        rows.logprobs[:n].scatter_(1, length[:, None], logprob[:, None])
        length += rows.live[:n]
        ended = (self._ends[token] | (length >= rows.limit[:n])) & (rows.live[:n] > 0)
        # On a GPU this is the step's one synchronisation.
        finished: list[int] = ended.nonzero().flatten().tolist()
        sampled = clock()
        self._extent += 1
        self.times.steps += 1
        self._watch.step(self.times.steps)
        self.times.tokens += rows.count
        self._finish(finished)
        self.times.forward_s += forwarded - began
        self.times.sampling_s += sampled - forwarded
        self.times.bookkeeping_s += clock() - sampled

    def _finish(self, ended: list[int]) -> None:
        """Hand over the rows that ended, and those whose text has a stop string."""
        stopped = [row for row in self._stopping if row not in ended and self._has_stop(row)]
        if not ended and not stopped:
            return
        rows = self._rows
        done = ended + stopped
        lengths = rows.length[done].tolist()
        tokens = rows.tokens[done, : max(lengths)].tolist()
        logprobs = rows.logprobs[done, : max(lengths)].tolist()
        for at, row in enumerate(done):
            path = tokens[at][: lengths[at]]
            # The last token was never an input: it has no keys and values yet.
            self._store.put(path[:-1], partial(self._cache.read, row))
            current = self._at(row)
            start = len(current.prompt)
            stop = row in stopped or path[-1] in self._model.info.eos_token_ids
            reason = FinishReason.STOP if stop else FinishReason.LENGTH
            scores = logprobs[at][start : lengths[at]]
            current.complete(path[start:], scores, self.version, reason)
        rows.drop(done)
        self._changed()

    def _admit(self) -> None:
        """Give rows to waiting samples, by priority and then in order, as far as rows and memory go."""
        if not self._waiting:
            return
        rows, cache = self._rows, self._cache
        # An empty batch may shrink its rows again where their length costs places.
        free_to_shrink = rows.count == 0 and self._room(cache.capacity) < self._max_batch
        capacity = 0 if free_to_shrink else cache.capacity
        chosen: list[Sample] = []
        while self._waiting:
            request = self._waiting[0][2].job.request
            need = len(request.prompt_token_ids) + request.max_tokens
            grown = max(capacity, self._bucket(need))
            if rows.count + len(chosen) >= self._room(grown):
                break
            capacity = grown
            chosen.append(heappop(self._waiting)[2])
        if not chosen:
            return
        if capacity != cache.capacity:
            self._compact()  # the rows that remain must be among the first ones
            cache.resize(self._room(capacity), capacity, rows.span, self._extent)
        places = rows.free(len(chosen))
        rows.put(places, chosen)
        self._changed()
        self._start(places)

    def _start(self, places: Sequence[int]) -> None:
        """Fill new rows with their prompts and count what that took."""
        groups = self._by_prompt(places)
        for prompt, rows in groups.items():
            self._rows.write_prompt(rows, prompt)
        self._watch.keep(groups, places)
        computed = self._prefill.prompts(groups)
        for row in places:
            job, prompt = self._at(row).job, self._at(row).prompt
            fresh = computed.pop(prompt, 0)  # the first row of a prompt pays for it
            job.computed_tokens += fresh + 1
            job.cached_tokens += len(prompt) - 1 - fresh

    def _compact(self) -> None:
        """Move the last rows to free places, so that no step computes void rows."""
        sources, targets = self._rows.holes()
        if not sources:
            return
        device = self._model.device
        self._cache.move(
            torch.tensor(sources, device=device), torch.tensor(targets, device=device), self._extent
        )
        self._rows.move(sources, targets, self._extent)
        self._changed()

    def _changed(self) -> None:
        """Look again at what holds for the rows as a whole."""
        rows = self._rows
        requests = {row: self._at(row).job.request for row in rows.running()}
        self._extent = int(rows.length[: rows.span].max()) if rows.span else 1
        self._truncates = any(r.top_k > 0 or r.top_p < 1 for r in requests.values())
        self._stopping = [row for row, r in requests.items() if r.stop]
        self._watch.over(rows.running())

    def _has_stop(self, row: int) -> bool:
        """Does a stop string end in the row's last token?"""
        current = self._at(row)
        stops = current.job.request.stop
        length = int(self._rows.length[row])
        tail = max(len(current.prompt), length - self._stops.window(stops))
        return self._stops.found(self._rows.tokens[row, tail:length].tolist(), stops)

    def _by_prompt(self, places: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in places:
            groups.setdefault(self._at(row).prompt, []).append(row)
        return groups

    def _at(self, row: int) -> Sample:
        current = self._rows.samples[row]
        assert current is not None, "only rows that run are looked at"
        return current

    def _room(self, capacity: int) -> int:
        """Rows of this many tokens that fit the memory and the batch."""
        fits = self._model.cache_bytes // (max(capacity, 1) * self._model.shape.token_bytes)
        return min(self._max_batch, fits)

    def _bucket(self, tokens: int) -> int:
        """Capacity for `tokens`: of few different sizes, at most a quarter above, within the context."""
        step = max(64, 1 << max(tokens.bit_length() - 3, 0))
        return min(-(-tokens // step) * step, self._model.info.max_model_len)
