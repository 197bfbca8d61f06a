"""The benchmark against peers, as far as it needs no peers: command lines, counting, arithmetic."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "peers"
MODULES = ("contenders", "environments", "figures", "race", "redis_server", "run")


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its modules find each other by their folder, as when it is run."""
    monkeypatch.syspath_prepend(str(HERE))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def counters(tmp_path: Path) -> Path:
    folder = tmp_path / "counters"
    folder.mkdir()
    return folder


def test_a_ratio_is_of_neighbours_only() -> None:
    from figures import Pair, table

    pairs = [Pair(1, "slow", 1000, 10), Pair(1, "quick", 1100, 500), Pair(2, "slow", 300, 5)]
    assert table(pairs) == [
        ("slow", "5 / 8 / 10", "60 / 80 / 100"),
        ("quick", "500 / 500 / 500", "2.2 / 2.2 / 2.2"),
        ("taskd", "300 / 1,000 / 1,100", ""),
    ]


def test_rates_have_three_digits() -> None:
    from figures import rate

    assert [rate(value) for value in (7.4, 451.2, 1234.5, 38_461.0)] == ["7", "451", "1,230", "38,500"]


def test_columns_stand_below_each_other() -> None:
    from figures import in_columns

    assert in_columns([("", "a"), ("rq", "450")]) == ["      a", "rq  450"]


def test_every_command_line_can_be_filled(counters: Path) -> None:
    from contenders import PEERS, TASKD, Place

    place = Place(Path("/bin"), Path("/folder"), counters, Path("/redis.sock"), 1, 2)
    for contender in (TASKD, *PEERS):
        for command in (contender.enqueue, *contender.workers, contender.server or ()):
            if command:
                words = place.fill(command)
                assert words[0].startswith("/bin/")
                assert not any("{" in word for word in words)


def test_everything_named_exists_and_is_pinned() -> None:
    from contenders import PEERS, TASKD

    for contender in (TASKD, *PEERS):
        if "enqueue" in contender.enqueue[2:]:
            assert (HERE / "programs" / f"{contender.enqueue[3]}.py").exists()
    for name in ("redis", *(peer.name for peer in PEERS if peer.name != "asynq")):
        lines = (HERE / "requirements" / f"{name}.txt").read_text().splitlines()
        assert lines
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), name


def test_the_slow_get_less_but_something() -> None:
    from contenders import PEERS

    counts = {peer.name: peer.count(50_000) for peer in PEERS}
    assert counts["rq"] < counts["celery"] < counts["asynq"] == 50_000
    assert all(peer.count(1) == 1 for peer in PEERS)


def test_taskd_settings_do_not_reach_contenders(monkeypatch: pytest.MonkeyPatch, counters: Path) -> None:
    from contenders import PEERS, TASKD, Place
    from race import environment

    monkeypatch.setenv("TASKD_SECRET", "x")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    place = Place(Path("/bin"), Path("/folder"), counters, Path("/redis.sock"), 1, 2)
    for contender in (TASKD, *PEERS):
        environ = environment(contender, place)
        assert "TASKD_SECRET" not in environ
        assert "PYTHONHASHSEED" not in environ
        assert environ["PEERS_COUNTERS"] == str(counters)
        assert environ.items() >= contender.variables.items()


COUNT = """
import os, threading
from counted import count
count()
threads = [threading.Thread(target=lambda: [count() for _ in range(1000)]) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if (child := os.fork()) == 0:
    count()
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.process
def test_threads_and_forked_children_are_counted(counters: Path) -> None:
    from race import counted

    environ = {"PEERS_COUNTERS": str(counters), "PYTHONPATH": str(HERE / "programs")}
    subprocess.run([sys.executable, "-c", COUNT], env=environ, check=True)
    assert counted(counters) == 4002


def test_a_run_is_timed_from_the_first_to_the_last(counters: Path) -> None:
    from race import Run

    assert Run(count=1000, counted=900, seconds=0.5).per_s == 1800
    assert Run(count=1000, counted=0, seconds=0.0).per_s == 0


def test_a_worker_that_ends_early_is_told(counters: Path) -> None:
    from contenders import Place
    from race import Failed, started, watch

    place = Place(Path("/bin"), counters.parent, counters, Path("/redis.sock"), 1, 2)
    with started(["sh", "-c", "echo no such queue; exit 1"], place, {}, "worker-0") as process:
        process.wait()
        with pytest.raises(Failed, match=r"when 0 of 5 had run:\n  worker-0: no such queue"):
            watch(place, 5, [process])


def test_unknown_peers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    from run import arguments

    assert [peer.name for peer in arguments(["--only", "rq,celery"]).peers] == ["celery", "rq"]
    with pytest.raises(SystemExit):
        arguments(["--only", "celary"])
    assert "found celary" in capsys.readouterr().err


def test_a_redis_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from environments import Unavailable
    from redis_server import find

    monkeypatch.setenv("TASKD_REDIS_SERVER", "/no/such/redis-server")
    with pytest.raises(Unavailable, match="TASKD_REDIS_SERVER is '/no/such/redis-server'"):
        find()
