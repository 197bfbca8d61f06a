"""The README tells the truth: its files are written and its commands run, in its order."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from conftest import Environment

pytestmark = [pytest.mark.process, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GIVE_UP_AFTER_S = 30


class Step(NamedTuple):
    """Either commands to run, or (when `path` is set) a file to write."""

    text: str
    path: str = ""


def steps(markdown: str) -> Iterator[Step]:
    """Console blocks, one step for each command, and the files that are named right before their block."""
    for match in re.finditer(r"(?:`([\w./-]+)`:\n\n)?```(\w+)\n(.*?)```", markdown, re.DOTALL):
        path, language, text = match.groups()
        if language == "console":
            yield from (Step(line[2:]) for line in text.splitlines() if line.startswith("$ "))
        elif path:
            yield Step(text, path)


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_steps_are_found() -> None:
    found = list(steps(README))
    assert [step.path for step in found if step.path] == ["pyproject.toml", "greetings/tasks.py"]
    assert "make demo" in [step.text for step in found]
    assert "taskd dev" in [step.text for step in found]


def test_make_targets_exist() -> None:
    named = re.findall(r"make ([a-z-]+)", "\n".join(re.findall(r"`[^`\n]+`|^\$ .*", README, re.MULTILINE)))
    assert {"demo", "test", "setup"} <= set(named)
    assert set(named) <= targets()


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", "plugins/*/README.md"):
        for page in ROOT.glob(name):
            for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
                assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"


def test_files_named_in_the_guides_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"(?:taskd|tests|conf|plugins|proto)/[\w./-]*\w", text):
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_tutorial(fresh_environment: Environment, tmp_path: Path) -> None:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        rpc_port, http_port = (probe.getsockname()[1] for probe in probes)
    environ = fresh_environment.variables | {
        "TASKD_RPC__PORT": str(rpc_port),
        "TASKD_HTTP__PORT": str(http_port),
        "TASKD_BROKER": f"127.0.0.1:{rpc_port}",
    }
    folder = tmp_path
    with ExitStack() as stack:
        for step in steps(README):
            if step.path:
                (folder / step.path).write_text(step.text, encoding="utf-8")
            elif step.text.startswith("cd "):
                folder = folder / step.text.removeprefix("cd ")
            elif step.text == "taskd dev":
                stack.enter_context(in_background(step.text, folder, environ))
                wait_until_answering(f"http://127.0.0.1:{http_port}/readyz")
            elif not step.text.startswith(("make ", "source ")):  # those are the test's surroundings
                run(step.text, folder, environ)
        for url in re.findall(r"<http://127\.0\.0\.1:50052(/\w+)>", README):
            wait_until_answering(f"http://127.0.0.1:{http_port}{url}")
        for name in ("世界", "Ada", "Grace"):
            wait_until_written(f"Hello, {name}", folder / "output")


def run(command: str, folder: Path, environ: dict[str, str]) -> None:
    shell = ["bash", "-euc", command]
    done = subprocess.run(shell, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"


@contextmanager
def in_background(command: str, folder: Path, environ: dict[str, str]) -> Iterator[None]:
    """Run a daemon while the block lasts, then press Ctrl-C: it must stop with exit code 0."""
    output = folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            command.split(), cwd=folder, env=environ, stdout=out, stderr=subprocess.STDOUT, process_group=0
        )
    try:
        yield
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, output.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_answering(url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers() -> bool:
        try:
            with direct.open(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    wait_until(answers, f"an answer of {url}")


def wait_until_written(text: str, path: Path) -> None:
    wait_until(lambda: text in path.read_text(encoding="utf-8"), f"{text!r} in {path}")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Another process gives no event to wait for, so it is asked again and again."""
    give_up_s = time.monotonic() + GIVE_UP_AFTER_S
    while not condition():
        assert time.monotonic() < give_up_s, f"waited {GIVE_UP_AFTER_S} s for {what}"
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("log", ["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_the_demo_loses_nothing(log: str) -> None:
    target = {"embedded": "demo", "kafka": "demo-kafka"}[log]
    done = subprocess.run(
        ["make", target], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "delivered" in done.stdout
