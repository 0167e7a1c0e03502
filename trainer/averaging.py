"""How the tokens of an optimizer batch are averaged into one loss.

    token        sum over participating tokens / their number                      (DAPO, arXiv 2503.14476)
    sequence     mean over responses of the mean over each one's tokens             (GRPO, arXiv 2402.03300)
    constant     sum over participating tokens / (responses x max_tokens)           (Dr. GRPO, arXiv 2503.20783)
    micro_batch  mean over micro-batches of the mean over each one's tokens         (the authors' code)

All but the last are the same however the batch is cut into micro-batches. A response is a row of the packed batch:
in a group or a chain that is exact, while in a tree a row is one path's share, so that trees take `token` alone.
Responses without any advantage were dropped before: `algorithm.drop_zero = false` counts them too.
"""

from collections.abc import Sequence

from torch import Tensor

from trainer.packing import Row, participating_tokens
from trainer.settings import Average


def denominators(
    micros: Sequence[Sequence[Row]], average: Average, *, rows: int, max_tokens: int
) -> list[float]:
    """[M] what each micro-batch's sum of weighted losses is divided by, so that the quotients add up to the loss.

    Args:
        micros: [M] the micro-batches of one optimizer batch.
        average: how.
        rows: responses of the batch, those without participating tokens included, for `constant`.
        max_tokens: bound of a response, for `constant`.
    """
    everything = [row for micro in micros for row in micro]
    match average:
        case Average.TOKEN:
            whole = participating_tokens(everything)
        case Average.SEQUENCE:
            whole = sum(bool(row.participates.any()) for row in everything)
        case Average.CONSTANT:
            whole = rows * max_tokens
        case Average.MICRO_BATCH:
            return [float(len(micros) * participating_tokens(micro)) for micro in micros]
    return [float(whole)] * len(micros)


def weights(participates: Tensor, average: Average) -> Tensor | None:
    """[B, L] weight of each token before the division; None where all weigh 1.

    >>> import torch
    >>> weights(torch.tensor([[True, True], [True, False]]), Average.SEQUENCE).tolist()
    [[0.5, 0.5], [1.0, 1.0]]
    """
    if average is not Average.SEQUENCE:
        return None
    counts = participates.sum(1, keepdim=True).clamp(min=1)
    return (1 / counts).expand(participates.shape)
