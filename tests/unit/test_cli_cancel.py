"""What `taskd cancel` says, and how it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from typer.testing import CliRunner

from taskd.cli import operate
from taskd.cli.app import app
from taskd.cli.cancel import words
from taskd.cli.inspect import _line
from taskd.wire.generated.taskd.v1 import CancelEffect, CancelledActivation

WIDE = {"COLUMNS": "160", "TERM": "dumb"}


class Operators:
    """Whoever is asked answers with what was prepared, and remembers the order."""

    def __init__(self) -> None:
        self.answer: list[CancelledActivation] = []
        self.order: dict[str, Any] = {}

    def ask(
        self, config: Any, socket: Any, address: Any, order: Callable[[Operators], Awaitable[Any]]
    ) -> Any:
        async def asked() -> Any:
            return await order(self)

        return trio.run(asked)

    async def cancel(self, ids: list[str], reason: str, author: str, *, even_unknown: bool) -> Any:
        self.order = {"ids": ids, "reason": reason, "author": author, "even_unknown": even_unknown}
        return self.answer


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Operators:
    found = Operators()
    monkeypatch.setattr(operate, "ask", found.ask)
    return found


def run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["cancel", *arguments], env=WIDE, input=stdin)


def one(effect: CancelEffect, state: str = "pending", outcome: str = "", newest: str = "") -> Any:
    return CancelledActivation(id="a", effect=effect, state=state, outcome=outcome, newest=newest)


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        (one(CancelEffect.DROPPED, "delayed"), 0, "a  was delayed: dropped\n"),
        (one(CancelEffect.STOPPING), 0, "a  was running: dropped, its worker is told to stop it\n"),
        (one(CancelEffect.UNTOLD), 0, "it may run to its end there, its result will be ignored\n"),
        (one(CancelEffect.EXPECTED), 0, "a  is not here yet: will be dropped if it comes"),
        (one(CancelEffect.ENDED, "gone", "dropped"), 0, "a  ended before: dropped\n"),
        (one(CancelEffect.ENDED, "gone", "complete"), 1, "a  ended before: complete\n"),
        (one(CancelEffect.LEAVING, "failure"), 1, "it failed, and its dead letter is being published\n"),
        (one(CancelEffect.LEAVING, "forwarded"), 1, "it is on its way to another topic\n"),
        (one(CancelEffect.UNKNOWN, "unknown"), 1, "a  unknown to this broker: still in the log, "),
        (one(CancelEffect.DROPPED, newest="b"), 0, "a  was retried as b, which was pending: dropped\n"),
        (
            one(CancelEffect.DROPPED, "retry", newest="b"),
            0,
            "dropped, and its retry b too should it come here",
        ),
        (one(CancelEffect.EXPECTED, newest="b"), 0, "a  was retried as b, which is not here yet: "),
    ],
)
def test_each_answer_in_words(operators: Operators, found: Any, code: int, said: str) -> None:
    operators.answer = [found]
    result = run("a", "--reason", "why")
    assert (result.exit_code, said in result.stdout) == (code, True), result.stdout
    record = json.loads(run("a", "--reason", "why", "--json").stdout)[0]
    assert record["cancelled"] is (code == 0)
    assert record["effect"] == found.effect.name.lower()


def test_one_that_was_not_cancelled_is_an_exit_code(operators: Operators) -> None:
    operators.answer = [one(CancelEffect.DROPPED), one(CancelEffect.UNKNOWN)]
    assert run("a", "b", "--reason", "why").exit_code == 1


def test_ids_from_stdin_each_once(operators: Operators) -> None:
    assert run("a", "-", "--reason", "why", "--author", "ann", stdin="b\nc a\n\nb").exit_code == 0
    assert operators.order == {
        "ids": ["a", "b", "c"], "reason": "why", "author": "ann", "even_unknown": False,
    }  # fmt: skip
    assert run("a", "--reason", "why", "--even-if-unknown").exit_code == 0
    assert operators.order["even_unknown"] is True


def test_an_order_without_ids_or_reason_is_wrong_usage(operators: Operators) -> None:
    for arguments, stdin in ((("-", "--reason", "why"), ""), (("a",), None), (("--reason", "why"), None)):
        assert run(*arguments, stdin=stdin).exit_code == 2
    assert operators.order == {}


def test_a_user_without_a_name_is_a_number(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under an id of its own."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert run("a", "--reason", "why").exit_code == 0
    assert operators.order["author"] == f"uid {os.getuid()}"


def test_one_broker_is_meant() -> None:
    result = run("a", "--reason", "why", "--socket", "a.sock", "--address", "127.0.0.1:1")
    assert (result.exit_code, "not both" in result.stderr) == (2, True)


def test_no_broker_takes_the_order(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.telemetry.logs.setup_logging", lambda *_: None)  # of the whole process
    result = run("a", "--reason", "why", "--socket", str(tmp_path / "nobody.sock"))
    assert result.exit_code == 69
    assert "no broker takes orders at" in result.stderr


def test_every_effect_has_words() -> None:
    for effect in CancelEffect:
        if effect is not CancelEffect.UNSPECIFIED:
            assert words(one(effect))


def test_an_effect_of_a_newer_broker_is_no_crash() -> None:
    assert words(CancelledActivation.parse(b"\x0a\x01a\x10\x63")).startswith("answered in a way")


def test_the_status_says_who_cancelled() -> None:
    from taskd.admin.wait import Seen

    fields = {"state": "gone", "outcome": "dropped", "reason": "cancelled", "error": "by ann: wrong template"}
    told = _line(Seen(**{"id": "a", **_blank(), **fields}))
    assert told == "a  dropped (cancelled by ann: wrong template)"


def _blank() -> dict[str, Any]:
    return {
        "continued_as": "",
        "dead_lettered": False,
        "attempts": 0,
        "received_at_ms": 0,
        "finished_at_ms": 0,
    }
