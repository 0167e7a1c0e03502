"""Drawing tokens: the generator against big integers, the inversion against a loop, and rough statistics."""

import doctest
import math

import pytest
import torch

from server.engines import sampling
from server.engines.sampling import sample, signed64, truncate, uniforms

M64 = 2**64 - 1


def splitmix(seed: int, index: int) -> float:
    """The generator in plain integers."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
        return z ^ (z >> 31)

    weyl = 0x9E3779B97F4A7C15
    return (mix((mix(seed * weyl & M64) + (index + 1) * weyl) & M64) >> 11) / 2**53


def streams(seeds: int, count: int) -> torch.Tensor:
    """[seeds, count] the numbers of consecutive seeds."""
    grid = torch.arange(seeds)[:, None].expand(seeds, count)
    steps = torch.arange(count)[None, :].expand(seeds, count)
    return uniforms(grid.flatten(), steps.flatten()).view(seeds, count)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def test_docstring_examples():
    assert doctest.testmod(sampling).failed == 0


def test_numbers_are_those_of_plain_integers():
    cases = [(0, 0), (1, 5), (-1, 3), (2**63 - 1, 10**6), (-(2**63), 0), (4096 * 7 + 3, 511)]
    seeds, indices = (torch.tensor(column) for column in zip(*cases, strict=True))
    expected = [splitmix(seed, index) for seed, index in cases]
    assert uniforms(seeds, indices).tolist() == expected


def test_any_integer_is_a_seed():
    assert [signed64(s) for s in (0, -1, 2**63, 2**64 + 5)] == [0, -1, -(2**63), 5]


def test_numbers_are_uniform():
    counts = torch.histc(streams(100, 1000).float(), bins=50, min=0, max=1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 85  # 49 degrees of freedom: 0.1 % of honest generators are above


def test_neighbouring_streams_and_steps_are_unrelated():
    numbers = streams(200, 500)
    pairs = [
        (numbers[1:], numbers[:-1]),  # seed and seed + 1
        (numbers[:, 1:], numbers[:, :-1]),  # one step and the next
        (numbers[1:, :-1], numbers[:-1, 1:]),  # a stream and its neighbour, shifted
    ]
    for x, y in pairs:
        assert abs(correlation(x.flatten(), y.flatten())) < 4 / math.sqrt(x.numel())
    assert numbers.unique().numel() == numbers.numel()


def test_tokens_come_as_often_as_they_should():
    logits = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5, -0.5, 0.2])
    n = 20_000
    tokens, _ = sample(
        logits.expand(n, -1),
        uniforms(torch.arange(n), torch.zeros(n).long()),
        torch.full((n,), 0.7),
    )
    expected = (logits / 0.7).softmax(-1) * n
    chi_square = float(((tokens.bincount(minlength=8) - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # 7 degrees of freedom, 0.1 %


def test_inversion_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 37, generator=generator) * 3
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    temperature = torch.rand(64, generator=generator) + 0.3
    tokens, logprobs = sample(logits, uniform, temperature)
    for row in range(64):
        exact = (logits[row].double() / temperature[row].double()).softmax(-1)
        expected, total = 0, float(exact[0])
        while total <= float(uniform[row]):
            expected += 1
            total += float(exact[expected])
        assert int(tokens[row]) == expected
        assert float(logprobs[row]) == pytest.approx(math.log(exact[expected]), abs=1e-5)


def test_temperature_zero_is_greedy_and_scored_at_one():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    zero = torch.zeros(2)
    tokens, logprobs = sample(
        logits,
        torch.tensor([0.99, 0.99]).double(),
        zero,
        torch.tensor([1, 2]),
        torch.ones(2).double(),
    )
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(uniform: float):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf, 0.0, -math.inf]])
    token, logprob = sample(logits, torch.tensor([uniform], dtype=torch.float64), torch.ones(1))
    assert int(token) == (1 if uniform == 0 else 4)
    assert math.isfinite(float(logprob))


def test_numbers_that_are_none_give_a_token_and_say_so():
    token, logprob = sample(
        torch.full((1, 5), math.nan), torch.tensor([0.3], dtype=torch.float64), torch.ones(1)
    )
    assert 0 <= int(token) < 5
    assert math.isnan(float(logprob))


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 50, generator=generator)
    uniform = torch.rand(9, generator=generator, dtype=torch.float64)
    temperature = torch.ones(9)
    tokens, logprobs = sample(logits, uniform, temperature)
    for row in range(9):
        one = slice(row, row + 1)
        alone = sample(logits[one], uniform[one], temperature[one])
        assert int(alone[0]) == int(tokens[row])
        assert float(alone[1]) == float(logprobs[row])


def test_truncation_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 12, generator=generator)
    top_k = torch.randint(0, 6, (40,), generator=generator)
    top_p = torch.rand(40, generator=generator, dtype=torch.float64) * 0.9 + 0.1
    top_p[::3] = 1.0
    kept = truncate(logits, top_k, top_p)
    for row in range(40):
        order = sorted(range(12), key=lambda t: -float(logits[row, t]))
        if top_k[row]:
            order = order[: int(top_k[row])]
        weights = [math.exp(float(logits[row, t])) for t in order]
        nucleus: set[int] = set()
        mass = 0.0
        for token, weight in zip(order, weights, strict=True):
            if mass >= float(top_p[row]) and float(top_p[row]) < 1:
                break
            nucleus.add(token)
            mass += weight / sum(weights)
        assert {t for t in range(12) if math.isfinite(float(kept[row, t]))} == nucleus
        assert all(kept[row, t] == logits[row, t] for t in nucleus)


def test_ties_in_top_k_keep_k_tokens():
    kept = truncate(torch.zeros(1, 6), torch.tensor([2]), torch.ones(1, dtype=torch.float64))
    assert kept.isfinite().tolist() == [[True, True, False, False, False, False]]
