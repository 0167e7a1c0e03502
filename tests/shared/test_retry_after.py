"""Whatever stands in a Retry-After header gives a bounded wait or none, never an error."""

import pytest

from shared.retry_after import LONGEST_S, retry_after_s


@pytest.mark.parametrize(
    "text",
    [
        "Wed, 21 Oct 99999999999999999999 07:28:00 GMT",
        "Wed, 21 Oct 2026 07:28:00 +99999999999999999999",
        "Wed, 21 Oct 2026 07:28:00 -9999",
        "Wed, 21 Oct 0001 00:00:00 +2359",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "Wed, 21 Oct 2026 99999999999:28:00 GMT",
        "nan",
        "",
        " ",
        ",",
        "0 0 0",
    ],
)
def test_absurd_dates_are_none_or_bounded(text: str) -> None:
    for asked, date in ((text, None), ("Wed, 21 Oct 2026 07:28:00 GMT", text), (text, text)):
        wait = retry_after_s(asked, now=1e9, date=date)
        assert wait is None or 0.0 <= wait <= LONGEST_S


def test_waits_are_capped() -> None:
    for text in ("1" + "0" * 400, "9" * 5000, "1e400", "inf", "Fri, 31 Dec 9999 23:59:59 GMT"):
        assert retry_after_s(text, now=0.0) == LONGEST_S
    for text in ("-5", "-inf", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert retry_after_s(text, now=2e9) == 0.0
