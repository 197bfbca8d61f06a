"""Without a terminal, progress is a line every few seconds."""

from __future__ import annotations

import trio

from taskd.cli.meter import LINE_EVERY_S, meter


async def test_a_line_every_few_seconds(autojump_clock, capsys):
    with meter("ended", 100) as step:
        for done in range(100):
            await trio.sleep(LINE_EVERY_S / 20)
            step(done, "1 failed" if done > 50 else "")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "ended: 19 of 100",
        "ended: 39 of 100",
        "ended: 59 of 100, 1 failed",
        "ended: 79 of 100, 1 failed",
        "ended: 99 of 100, 1 failed",
    ]


async def test_what_is_quick_says_nothing(autojump_clock, capsys):
    with meter("sent", 1) as step:
        step(1)
    assert capsys.readouterr().err == ""
