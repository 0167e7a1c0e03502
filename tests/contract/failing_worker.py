"""vLLM's worker with our methods, and two more: a write of weights that fails, and vLLM's own loader by choice."""

from collections.abc import Iterator

from torch import Tensor

from server.engines.vllm_worker import WeightLoader
from tests.contract.plain import Broken


class FailingLoader(WeightLoader):
    """A `WeightLoader` whose writes fail where a test says."""

    spoke_after: int | None = None

    def spoke_fail(self, after: int) -> None:
        """Let the next write fail once it has written `after` tensors."""
        self.spoke_after = after

    def spoke_choose(self, path: str) -> None:
        """Let new weights get in by `slots` or `loader`."""
        self._spoke_path = path

    def spoke_write(self) -> tuple[float, str | None]:
        """As the real one, but for the failure."""
        if self.spoke_after is not None and self._spoke_path == "slots":
            self._spoke_staged.insert(self.spoke_after, Broken())
            self.spoke_after = None
        return super().spoke_write()

    def _fresh(self) -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(super()._fresh()):
            if number == self.spoke_after:
                self.spoke_after = None
                raise RuntimeError("out of luck")
            yield item
