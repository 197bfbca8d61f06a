"""Who runs, and with which settings: each as fast as its own documentation lets it be on two processes.

Command lines are templates: `{bin}` is the folder of the contender's programs, the rest is of `Place`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

Command = tuple[str, ...]
ROOM = "100000000"  # activations: what is measured is the way, not taskd's limits on what may wait


@dataclass(frozen=True)
class Place:
    """Where one run happens; `folder` is empty at its start."""

    bin: Path
    folder: Path
    counters: Path
    redis: Path
    rpc_port: int
    http_port: int

    def fill(self, command: Command) -> list[str]:
        return [part.format_map(vars(self)) for part in command]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PEERS_COUNTERS": str(self.counters),
            "PEERS_REDIS": str(self.redis),
            "PEERS_RPC_PORT": str(self.rpc_port),
            "PEERS_HTTP_PORT": str(self.http_port),
        }


@dataclass(frozen=True)
class Contender:
    """`share`: of the activations that taskd gets, so that slower ones take seconds and not minutes."""

    name: str
    share: float
    enqueue: Command  # the number is appended
    workers: tuple[Command, ...]
    server: Command | None = None  # None: Redis
    variables: dict[str, str] = field(default_factory=dict)
    how: str = ""  # the settings in a few words, for the table

    def count(self, most: int) -> int:
        return max(1, round(most * self.share))


def _python(module: str) -> Command:
    return ("{bin}/python", "-m", "enqueue", module)


TASKD = Contender(
    name="taskd",
    share=1,
    server=("{bin}/taskd", "broker", "--data-dir", "{folder}/data",
            "--rpc-port", "{rpc_port}", "--http-port", "{http_port}"),
    enqueue=_python("taskd_app"),
    workers=(("{bin}/taskd", "worker", "--broker", "127.0.0.1:{rpc_port}", "--slots", "2"),),
    variables={
        "TASKD_STORE__MAX_PENDING_COUNT": ROOM,
        "TASKD_STORE__MAX_PROCESSING_COUNT": ROOM,
        "TASKD_POOLS__DEFAULT__MODULES": '["taskd_app"]',
    },
    how="embedded log, commits durable; 2 slots",
)  # fmt: skip

PEERS = (
    Contender(
        name="celery",
        share=0.2,
        enqueue=_python("celery_app"),
        # The solo pool needs no pipe between two processes for each task: prefork was slower on two CPUs.
        workers=tuple(
            ("{bin}/celery", "-A", "celery_app", "worker", "-P", "solo", "-n", f"{number}@peers",
             "--prefetch-multiplier", "256", "-l", "ERROR",
             "--without-gossip", "--without-mingle", "--without-heartbeat")
            for number in (1, 2)
        ),
        how="2 workers, solo pool, prefetch 256",
    ),
    Contender(
        name="dramatiq",
        share=0.6,
        enqueue=_python("dramatiq_app"),
        workers=(("{bin}/dramatiq", "dramatiq_app", "--processes", "2", "--threads", "4", "--skip-logging"),),
        variables={"dramatiq_queue_prefetch": "2000"},
        how="2 processes of 4 threads, prefetch 2000",
    ),
    Contender(
        name="taskiq",
        share=0.6,
        enqueue=_python("taskiq_app"),
        workers=(("{bin}/taskiq", "worker", "taskiq_app:broker", "--workers", "2", "--no-parse",
                  "--max-async-tasks", "100", "--max-prefetch", "100", "--log-level", "ERROR"),),
        how="2 processes, uvloop, orjson, 100 tasks at once",
    ),
    Contender(
        name="huey",
        share=0.6,
        enqueue=_python("huey_app"),
        workers=(("{bin}/huey_consumer", "huey_app.huey", "-k", "process", "-w", "2", "-n", "-q"),),
        how="2 processes",
    ),
    Contender(
        name="rq",
        share=0.06,
        enqueue=_python("rq_app"),
        workers=(("{bin}/rq", "worker", "--worker-class", "rq.SimpleWorker", "--url", "unix://{redis}",
                  "--quiet"),) * 2,
        how="2 workers that do not fork for each job",
    ),
    Contender(
        name="asynq",
        share=1,
        enqueue=("{bin}/asynq", "enqueue"),
        workers=(("{bin}/asynq", "work", "16"),),  # its threads use every CPU; two such were slower
        how="1 process on all CPUs, concurrency 16",
    ),
)  # fmt: skip
