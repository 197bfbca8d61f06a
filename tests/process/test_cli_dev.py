"""`taskd dev`, `submit` and `status` as a person uses them: real processes on the embedded log."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

WITHIN_S = 30
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def taskd(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "taskd", *arguments], text=True, **options)  # type: ignore[call-overload]


class Dev:
    def __init__(self, folder: Path) -> None:
        self.said = folder / "dev.err"
        with self.said.open("w") as err:
            self.process = taskd(
                *("dev", "--data-dir", str(folder / "data"), "--rpc-port", "0", "--http-port", "0"),
                stderr=err,
            )
        give_up_s = time.monotonic() + WITHIN_S
        while not (found := re.search(r"is ready: broker (\S+), health (\S+)", self.said.read_text())):
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < give_up_s, self.said.read_text()
            time.sleep(0.02)
        self.broker, self.health = found.groups()

    def run(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "taskd", *arguments, "--broker", self.broker],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    running = Dev(tmp_path_factory.mktemp("dev"))
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def test_one_call_and_its_status(dev: Dev):
    done = dev.run(
        "submit", "demo:add", "--kwargs", '{"a": 2, "b": 3}', "--wait", "--timeout", "20", "--json"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["sent"], summary["complete"], summary["unfinished"]) == (1, 1, 0)
    (id_,) = summary["ids"]
    status = dev.run("status", id_)
    assert (status.returncode, status.stdout.split()[:2]) == (0, [id_, "complete"])
    assert json.loads(dev.run("status", id_, "--json").stdout)[0]["outcome"] == "complete"
    unknown = dev.run("status", id_, "never-heard-of")
    assert unknown.returncode == 1
    assert "never-heard-of  unknown to this broker" in unknown.stdout


def test_async_tasks_wait_side_by_side(dev: Dev):
    arguments = ("submit", "demo:wait", "--kwargs", '{"seconds": 1}', "--count", "60", "--wait", "--json")
    done = dev.run(*arguments, "--timeout", "25")  # one after the other would take a minute
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["complete"], summary["unfinished"]) == (60, 0)


def test_a_retry_is_followed(dev: Dev):
    arguments = ("submit", "demo:flaky", "--kwargs", '{"failures": 1}', "--wait", "--timeout", "20", "--json")
    done = dev.run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"complete": 1, "retried": 1, "failed": 0}.items() <= json.loads(done.stdout).items()


def test_lines_from_stdin(dev: Dev):
    lines = "".join(f'{{"a": {number}, "b": 1}}\n' for number in range(30))
    arguments = ("submit", "demo:add", "--file", "-", "--count", "2", "--wait", "--timeout", "20")
    done = dev.run(*arguments, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "complete      60" in done.stdout


def test_a_bad_line_sends_nothing(dev: Dev):
    done = dev.run("submit", "demo:add", "--file", "-", stdin='{"a": 1, "b": 1}\n{"a": 1}\n')
    assert (done.returncode, done.stdout) == (1, "")
    assert "stdin:2: " in done.stderr


def ingested(dev: Dev) -> float:
    with DIRECT.open(dev.health.replace("/readyz", "/metrics")) as page:
        found = re.findall(rb"^taskd_ingest_records_total\{.*\} (\S+)$", page.read(), re.MULTILINE)
    return sum(map(float, found))


def test_interrupted_while_waiting(dev: Dev):
    before = ingested(dev)
    waiting = taskd(
        *(
            "submit",
            "demo:flaky",
            "--kwargs",
            '{"failures": 3}',
            "--count",
            "5",
            "--wait",
            "--broker",
            dev.broker,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while ingested(dev) < before + 5:
        assert waiting.poll() is None, waiting.communicate()
        time.sleep(0.05)
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=WITHIN_S)
    assert waiting.returncode == 130, err
    assert "Traceback" not in err
    assert "sent          5" in out


def test_ready_then_stopped_by_a_signal(dev: Dev):
    with DIRECT.open(dev.health) as answer:
        assert json.load(answer)["status"] == "ready"
    dev.process.send_signal(signal.SIGTERM)
    assert dev.process.wait(WITHIN_S) == 0
    assert "this is a bug" not in dev.said.read_text()
