"""Which calls a switch concerns, and what the file of switches may say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from taskd.activation.switches import (
    OPEN,
    Board,
    Condition,
    SwitchKind,
    conditions_of,
    conditions_text,
    same,
)
from taskd.admin import operate
from taskd.config.switch_file import DEMOTED_TOPIC, parse_switch_file
from taskd.errors import ConfigError

PAUSE, KILL, DEMOTE = SwitchKind
PATH = Path("switches.yaml")

VALUES: list[Any] = [
    None, True, False, 0, 1, 0.0, 1.0, -1, 2**63, "", "1", "true", b"1", [], [1], [1.0], [True], [1, 2],
    {}, {"a": 1}, {"a": 1.0}, {"a": True}, {"a": [1]}, {"a": 1, "b": 2}, {1: "a"}, {"1": "a"}, {1.0: "a"},
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), list(itertools.product(VALUES, VALUES)))
def test_only_equal_values_of_equal_types_are_the_same(one: Any, other: Any) -> None:
    assert same(one, other) is (repr(one) == repr(other))


def test_order_does_not_matter_in_maps_only() -> None:
    assert same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same([1, 2], [2, 1])


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (Condition(0, 17), True),
        (Condition(1, "x"), True),
        (Condition(1, 17), False),
        (Condition(2, None), False),  # a position that the call does not fill
        (Condition("template", "digest"), True),
        (Condition("template", "other"), False),
        (Condition("missing", None), False),
        (Condition("0", 17), False),
    ],
)
def test_a_condition_looks_at_one_argument(condition: Condition, holds: bool) -> None:
    assert condition.holds(([17, "x"], {"template": "digest"})) is holds


def test_conditions_survive_being_stored() -> None:
    conditions = (
        Condition(0, 1),
        Condition(1, 1.0),
        Condition("a", True),
        Condition("b", {"x": [None, "ä"]}),
    )
    assert repr(conditions_of(conditions_text(conditions))) == repr(conditions)
    assert conditions_text(conditions) == conditions_text(tuple(reversed(conditions)))


def test_a_board_without_switches_is_open_and_costs_nothing() -> None:
    assert Board().gate("shop", "mail") is OPEN
    assert not OPEN.closed
    assert not OPEN.by_task


def file(text: str) -> Any:
    return parse_switch_file(text.encode(), PATH)


def test_a_file_as_existing_brokers_have_it() -> None:
    found = file(
        """
        drop_task_killswitch:
          - issues.deliver_webhook
          - name: mail.send
            select_arg: {0: 17, "1": x}
            select_kwarg: {template: digest, deep: {a: [1, null]}}
        demoted_namespaces: [reports, ""]
        demoted_topic: other
        demoted_topic_cluster: a:9092,b:9092
        """
    )
    assert [(kill.taskname, kill.conditions) for kill in found.kills] == [
        ("issues.deliver_webhook", ()),
        (
            "mail.send",
            (
                Condition(0, 17),
                Condition(1, "x"),
                Condition("template", "digest"),
                Condition("deep", {"a": [1, None]}),
            ),
        ),
    ]
    assert [demotion.namespace for demotion in found.demotions] == ["reports", ""]
    assert (found.demoted_topic, found.demoted_topic_cluster) == ("other", "a:9092,b:9092")
    assert found.warnings == ()


def test_empty_lists_switch_nothing_and_the_topic_has_a_default() -> None:
    found = file("drop_task_killswitch: []\ndemoted_namespaces: []")
    assert (found.kills, found.demotions, found.demoted_topic) == ((), (), DEMOTED_TOPIC)


def test_a_map_without_conditions_drops_nothing_and_is_told() -> None:
    found = file(
        "drop_task_killswitch: [{name: a}, {name: b, select_arg: {}}]\ndemoted_namespaces: []\nmore: 1"
    )
    assert found.kills == ()
    assert len(found.warnings) == 3


KILLS = "demoted_namespaces: []\ndrop_task_killswitch: "


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["expected the lists"]),
        ("drop_task_killswitch: []", ["`demoted_namespaces` is missing"]),
        ("demoted_namespaces: []", ["`drop_task_killswitch` is missing"]),
        ("{}", ["`drop_task_killswitch` is missing", "`demoted_namespaces` is missing"]),
        ("drop_task_killswitch: a\ndemoted_namespaces:", ["a list, found the text", "found nothing"]),
        ("drop_task_killswitch: [1, '']\ndemoted_namespaces: [2]", ["killswitch.0`", ".1`", "namespace"]),
        (KILLS + "[{select_arg: {0: 1}}]", ["expected a task name"]),
        (KILLS + "[{name: a, select_arg: [1]}]", ["expected a map"]),
        (KILLS + "[{name: a, select_arg: {-1: 1}}]", ["a position from 0"]),
        (KILLS + "[{name: a, select_arg: {true: 1}}]", ["a position"]),
        (KILLS + "[{name: a, select_kwarg: {1: 1}}]", ["argument's name"]),
        (KILLS + "[{name: a, select_kwarg: {x: 2026-01-01}}]", ["quote it?"]),
        (KILLS + "[]\ndemoted_topic: 1", ["`demoted_topic`"]),
        (KILLS + "[]\ndrop_task_killswitch: []", ["given twice"]),
        (KILLS + "[", ["switches.yaml:2: not valid YAML"]),
        ("a: &a [*a]", ["is missing", "is missing"]),
        (KILLS + "!!python/name:os.system", ["not valid YAML"]),
    ],
)
def test_a_file_with_problems_names_each_and_counts_for_nothing(text: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        file(text)
    lines = str(refused.value).splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert problem in line
        assert line.startswith("switches.yaml")


def test_bytes_that_are_no_text_are_a_problem() -> None:
    with pytest.raises(ConfigError, match="UTF-8"):
        parse_switch_file(b"\xff", PATH)


@pytest.mark.parametrize(
    ("text", "ms"),
    [("90s", 90_000), ("30m", 1_800_000), ("2h", 7_200_000), ("1.5d", 129_600_000), ("5ms", 5)],
)
def test_times_are_read(text: str, ms: int) -> None:
    assert operate.duration_ms(text) == ms


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "0s", "1 week", "1e9h"])
def test_other_times_are_refused_in_words(text: str) -> None:
    with pytest.raises(operate.BadOrder, match="expected a time such as"):
        operate.duration_ms(text)


@pytest.mark.parametrize("part", ["shop", "app=shop", "task=", "="])
def test_a_subject_that_cannot_be_is_refused(part: str) -> None:
    with pytest.raises(operate.BadOrder, match="expected"):
        operate.subject([part])
    with pytest.raises(operate.BadOrder, match="given twice"):
        operate.subject(["task=a", "task=b"])


def test_a_subject_is_what_was_typed() -> None:
    found = operate.subject(["application=", "namespace=a=b", "task=t"])
    assert (found.application, found.namespace, found.taskname) == ("", "a=b", "t")


def test_conditions_are_json() -> None:
    assert operate.conditions(["0=17", "1=1.0"], ['a="x"', "b=true"]) == [
        Condition(0, 17), Condition(1, 1.0), Condition("a", "x"), Condition("b", True),
    ]  # fmt: skip
    for args, kwargs in [(["a=1"], []), (["0"], []), ([], ["a=x"]), ([], ["=1"])]:
        with pytest.raises(operate.BadOrder):
            operate.conditions(args, kwargs)
