"""What benchmarks say of what they measured."""

from __future__ import annotations

import pytest

from taskd.bench.figures import Report, at_least, at_most, percentile, spread


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (at_least(10), 10, True),
        (at_least(10), 9.99, False),
        (at_most(10), 10, True),
        (at_most(10), 10.01, False),
    ],
)
def test_a_target_is_met_on_its_side(target: object, value: float, met: bool) -> None:
    report = Report("x", {})
    report.add("figure", value, "ms", target=target)  # type: ignore[arg-type]
    assert report.figures[0].met is met
    assert report.all_met is met
    assert report.rows()[0][3] == ("met" if met else "MISSED")


def test_a_figure_without_a_target_misses_none() -> None:
    report = Report("x", {"cpus": 2})
    report.add("figure", 1234.5, "/s", detail="of so many")
    assert report.all_met
    assert report.rows() == [("figure", "1,234 /s", "", "", "of so many")]
    assert report.as_json() == {
        "benchmark": "x",
        "machine": {"cpus": 2},
        "figures": [{"name": "figure", "value": 1234.5, "unit": "/s", "detail": "of so many"}],
    }


def test_json_says_what_was_wanted() -> None:
    report = Report("x", {})
    report.add("fast", 7, "/s", target=at_least(8))
    report.add("soon", 0.5, "ms", target=at_most(4))
    fast, soon = report.as_json()["figures"]
    assert (fast["target"], fast["met"]) == ({"at_least": 8}, False)
    assert (soon["target"], soon["met"]) == ({"at_most": 4}, True)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 50) == 51
    assert percentile(values, 99) == 100
    assert percentile(values, 100) == 100
    assert percentile([3.0], 50) == 3


def test_spread_is_least_median_largest() -> None:
    assert spread([3.0, 1.0, 200.0]) == "1.00 / 3.00 / 200 in 3 rounds"
