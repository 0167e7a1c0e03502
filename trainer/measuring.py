"""Held-out accuracy of the policy, before, during and after a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.checkpoints import Progress
from trainer.config import TrainSettings
from trainer.data import Question
from trainer.evaluate import Accuracy, evaluate
from trainer.fleet import Fleet
from trainer.report import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Asks the fleet about held-out questions.

    Args:
        settings: of the run.
        fleet: answers.
        heldout: the questions; during a run, the first `evaluation.questions_during` of them.
        session: part of every request id.
    """

    settings: TrainSettings
    fleet: Fleet
    heldout: Sequence[Question]
    session: str

    def questions(self, *, during: bool) -> Sequence[Question]:
        """What a measurement asks."""
        return self.heldout[: self.settings.evaluation.questions_during] if during else self.heldout

    async def measure(self, progress: Progress, *, during: bool) -> Measurement:
        """At the evaluation's own temperature, and greedily before and after.

        Args:
            progress: where the run stands; answers are of its version or later.
            during: in the middle of the run.
        """
        evaluation, questions = self.settings.evaluation, self.questions(during=during)
        sampled = await self._accuracy(
            questions, evaluation.samples, evaluation.temperature, progress
        )
        greedy = None
        if evaluation.greedy and not during:
            greedy = await self._accuracy(questions, 1, 0.0, progress)
        return Measurement(
            step=progress.step,
            sampled_tokens=progress.sampled_tokens,
            seconds=progress.seconds,
            sampled=sampled,
            greedy=greedy,
        )

    async def _accuracy(
        self, questions: Sequence[Question], samples: int, temperature: float, progress: Progress
    ) -> Accuracy:
        return await evaluate(
            self.fleet,
            questions,
            data=self.settings.data,
            reward=self.settings.reward,
            samples=samples,
            temperature=temperature,
            max_tokens=self.settings.rollout.max_tokens,
            name=f"{self.settings.run}/{self.session}/eval-{progress.step}-{temperature}",
            # The same seed each time: measurements before and after differ by the weights alone.
            seed=self.settings.seed,
            min_weight_version=progress.version,
        )
