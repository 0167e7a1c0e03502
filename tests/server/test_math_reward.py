"""The math reward through a real worker process, the only place that loads sympy; one for all cases."""

import pytest
import pytest_asyncio

from server.rewards import Grade, RewardPool
from shared.errors import RequestError

pytestmark = pytest.mark.asyncio(loop_scope="module")

MATH_ANSWERS = [
    # reference, response, reward
    (r"\frac{1}{2}", r"so \boxed{\frac{1}{2}}", 1),
    (r"\frac{1}{2}", r"\boxed{0.5}", 1),
    (r"\frac{1}{2}", r"\boxed{1/2}", 1),
    (r"\frac{1}{2}", r"\boxed{\frac12}", 1),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", 0),
    (r"\frac{1}{2}", "the answer is 1/2", 0),  # no box
    ("72", r"\boxed{70}, no: \boxed{72}", 1),  # the last box
    ("72", r"\boxed{72}, no: \boxed{70}", 0),
    ("72", r"\boxed{72} or \boxed{70", 1),  # the last one is not closed
    ("72", r"\boxed{\boxed{72}}", 1),
    ("72", r"\fbox{72}", 1),
    ("72", r"\boxed{72.}", 1),
    ("72", r"\boxed{}", 0),
    ("72", r"\boxed {$72$}", 1),
    ("72", r"\boxed{\text{about } \{72}", 0),  # an escaped brace closes nothing
    ("$72$", r"\boxed{72.0}", 1),
    (r"First 5, so \boxed{5}. Then \boxed{72}.", r"\boxed{72}", 1),  # a whole solution as reference
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
    ("(x+1)^2", r"\boxed{x^2+2x+1}", 1),
    ("5", r"\boxed{x=5}", 1),
    ("1,2,3", r"\boxed{\{3, 1, 2\}}", 1),
    (r"(-\infty, 2]", r"\boxed{(-\infty,2]}", 1),
    (r"(-\infty, 2]", r"\boxed{(-\infty,2)}", 0),
    (r"(3, \frac{\pi}{2})", r"\boxed{(3,\pi/2)}", 1),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1),
    (r"\text{Evelyn}", r"\boxed{\text{Briana}}", 0),
    (r"\text{(C)}", r"\boxed{C}", 1),
    (r"10\%", r"\boxed{10}", 1),
    ("1,000", r"\boxed{1{,}000}", 1),
    (r"90^\circ", r"\boxed{90}", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", 1),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool():
    pool = RewardPool(workers=1, timeout_s=4.0)
    await pool.start(["math"])
    yield pool
    await pool.close()


@pytest.mark.parametrize(("reference", "response", "reward"), MATH_ANSWERS)
async def test_a_boxed_answer_is_compared_as_mathematics(pool, reference, response, reward):
    assert await pool.grade("math", [response], reference, {}) == [Grade(reward=reward)]


@pytest.mark.parametrize("reference", ["", "  ", r"\boxed{}", r"so \boxed{5"])
async def test_a_reference_that_cannot_be_read_is_refused(pool, reference):
    with pytest.raises(RequestError) as refused:
        await pool.check("math", reference, {})
    assert refused.value.field == "reward.reference"


async def test_a_tower_of_powers_costs_one_leafs_limit_and_no_other_leaf(pool):
    answers = [r"\boxed{72}", r"\boxed{9^{9^{9^{9^9}}}}", r"\boxed{\frac{144}{2}}"]
    first, tower, last = await pool.grade("math", answers, "72", {})
    assert (first, last) == (Grade(reward=1.0), Grade(reward=1.0))
    assert tower == Grade(reward=0.0, error="took longer than its limit of 4 s")


async def test_thousands_of_open_boxes_are_read_in_linear_time(pool):
    text = r"\boxed{" * 50_000 + "72}"
    assert await pool.grade("math", [text], "72", {}) == [Grade(reward=1.0)]
