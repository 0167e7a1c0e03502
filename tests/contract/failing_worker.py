"""vLLM's worker with our methods, and one more: its next write of weights fails half-way."""

from server.engines.vllm_worker import WeightLoader
from tests.contract.plain import Broken


class FailingLoader(WeightLoader):
    """A `WeightLoader` whose writes fail where a test says."""

    spoke_after: int | None = None

    def spoke_fail(self, after: int) -> None:
        """Let the next write fail once it has written `after` tensors."""
        self.spoke_after = after

    def spoke_write(self) -> tuple[float, str | None]:
        """As the real one, but for the failure."""
        if self.spoke_after is not None:
            self._spoke_staged.insert(self.spoke_after, Broken())
            self.spoke_after = None
        return super().spoke_write()
