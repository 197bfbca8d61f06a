"""A real Apache Kafka for tests: fetched by Maven, started in a temporary directory, stopped at the end.

    python tests/kafka/real_kafka.py COMMAND…

runs the command with TASKD_TEST_KAFKA=host:port, and TASKD_TEST_KAFKA_SECURE naming a JSON file that
describes the listeners with credentials. Needs Maven, a JDK 17 and openssl; without them it says so and
exits with 1.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
POM = Path(__file__).with_name("pom.xml")
CACHE = ROOT / ".cache" / "kafka"
CLUSTER_ID = "taskdTaskdTaskdTaskdTA"  # 22 characters; one that begins with a hyphen is taken for an option
USER, PASSWORD = "taskd", "hush hush"
START_WITHIN_S = 60.0
STOP_WITHIN_S = 15.0
_ARE_YOU_THERE = b"\0\0\0\x0a\0\x12\0\0\0\0\0\x01\xff\xff"  # ApiVersions, version 0, no client id


class Unavailable(Exception):
    """There is no Kafka to be had here; the message says why."""


@dataclass(frozen=True)
class Listeners:
    """`host:port` of each, and the PEM files that go with those that speak TLS."""

    plaintext: str
    ssl: str  # asks for a certificate of the client
    sasl_plaintext: str
    sasl_ssl: str
    ca: str
    certificate: str
    key: str
    username: str = USER
    password: str = PASSWORD


def fetch() -> Path:
    """The folder of Kafka's jars, filled by Maven when it is not there yet."""
    for program, what in (("mvn", "Maven"), ("java", "a JDK 17"), ("openssl", "openssl")):
        if shutil.which(program) is None:
            raise Unavailable(f"expected {what} on PATH, found no `{program}`: install it")
    jars = CACHE / "jars"
    stamp = CACHE / "pom.xml"
    if stamp.exists() and stamp.read_bytes() == POM.read_bytes():
        return jars
    shutil.rmtree(CACHE, ignore_errors=True)
    jars.mkdir(parents=True)
    command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
    command += ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
    if subprocess.run(command, check=False).returncode != 0:
        raise Unavailable("Maven could not fetch Kafka; what it said is above")
    shutil.copyfile(POM, stamp)
    return jars


class ApacheKafka:
    """One broker that is its own controller, in `folder`. It may be stopped, killed and started again."""

    def __init__(self, folder: Path, jars: Path) -> None:
        self._folder = folder
        self._jars = jars
        self._process: subprocess.Popen[bytes] | None = None
        names = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL", "CONTROLLER")
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        _certificates(folder)
        (folder / "server.properties").write_text(self._properties())
        (folder / "log4j.properties").write_text("")
        scram = [f"SCRAM-SHA-{n}=[name={USER},password={PASSWORD}]" for n in (256, 512)]
        self._java(
            "kafka.tools.StorageTool",
            "format", "-t", CLUSTER_ID, "-c", "server.properties",
            *[argument for entry in scram for argument in ("--add-scram", entry)],
        )  # fmt: skip

    @property
    def listeners(self) -> Listeners:
        at = {name: f"127.0.0.1:{port}" for name, port in self._ports.items()}
        return Listeners(
            at["PLAINTEXT"],
            at["SSL"],
            at["SASL_PLAINTEXT"],
            at["SASL_SSL"],
            str(self._folder / "ca.pem"),
            str(self._folder / "client.pem"),
            str(self._folder / "client.key"),
        )

    def start(self) -> None:
        """Returns when it answers."""
        output = self._folder / "output"
        with output.open("ab") as out:
            self._process = subprocess.Popen(
                self._command("kafka.Kafka", "server.properties"),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; Kafka ends after we are done with it
            )
        deadline = time.monotonic() + START_WITHIN_S
        while not _answers(self._ports["PLAINTEXT"]):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise Unavailable(f"Kafka did not start:\n{output.read_text()[-3_000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Such as SIGSTOP: its sockets stay open, and nobody answers there."""
        assert self._process is not None
        self._process.send_signal(number)

    def _command(self, main: str, *arguments: str) -> list[str]:
        options = ["-Xmx512m", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        return ["java", *options, "-cp", f"{self._jars}/*", main, *arguments]

    def _java(self, main: str, *arguments: str) -> None:
        done = subprocess.run(
            self._command(main, *arguments), cwd=self._folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise Unavailable(f"{main} failed: {done.stdout}{done.stderr}")

    def _properties(self) -> str:
        listeners = ",".join(f"{name}://127.0.0.1:{port}" for name, port in self._ports.items())
        public = ",".join(
            f"{name}://127.0.0.1:{port}" for name, port in self._ports.items() if name != "CONTROLLER"
        )
        lines = [
            "process.roles=broker,controller",
            "node.id=1",
            f"controller.quorum.voters=1@127.0.0.1:{self._ports['CONTROLLER']}",
            "controller.listener.names=CONTROLLER",
            f"listeners={listeners}",
            f"advertised.listeners={public}",
            "inter.broker.listener.name=PLAINTEXT",
            "listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,"
            "SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL",
            f"log.dirs={self._folder}/data",
            "offsets.topic.replication.factor=1",
            "offsets.topic.num.partitions=5",
            "transaction.state.log.replication.factor=1",
            "transaction.state.log.min.isr=1",
            "group.initial.rebalance.delay.ms=0",
            "auto.create.topics.enable=false",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users=User:ANONYMOUS",  # all on the plaintext listener, and the cluster itself
            "allow.everyone.if.no.acl.found=true",
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "ssl.keystore.type=PEM",
            f"ssl.keystore.location={self._folder}/server.both.pem",
            "ssl.truststore.type=PEM",
            f"ssl.truststore.location={self._folder}/ca.pem",
            "listener.name.ssl.ssl.client.auth=required",
        ]
        for listener in ("sasl_plaintext", "sasl_ssl"):
            login = f"listener.name.{listener}.{{}}.sasl.jaas.config=org.apache.kafka.common.security.{{}}"
            plain = login.format("plain", "plain.PlainLoginModule")
            lines.append(f'{plain} required user_{USER}="{PASSWORD}";')
            for n in (256, 512):
                lines.append(login.format(f"scram-sha-{n}", "scram.ScramLoginModule") + " required;")
        return "\n".join(lines) + "\n"


@contextmanager
def open_apache_kafka() -> Iterator[ApacheKafka]:
    """A broker while the block lasts. Raises Unavailable."""
    jars = fetch()
    with tempfile.TemporaryDirectory(prefix="taskd-kafka-") as folder:
        kafka = ApacheKafka(Path(folder), jars)
        try:
            kafka.start()
            yield kafka
        finally:
            kafka.stop()


def _certificates(folder: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA"
    )
    (folder / "server.ext").write_text("subjectAltName=IP:127.0.0.1")
    (folder / "client.ext").write_text("extendedKeyUsage=clientAuth")
    for who in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        openssl(
            "x509", "-req", "-in", f"{who}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", f"{who}.ext", "-out", f"{who}.pem",
        )  # fmt: skip
    both = (folder / "server.key").read_text() + (folder / "server.pem").read_text()
    (folder / "server.both.pem").write_text(both)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(_ARE_YOU_THERE)
            return bool(connection.recv(8))
    except OSError:
        return False


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def main(command: list[str]) -> int:
    try:
        with open_apache_kafka() as kafka, tempfile.NamedTemporaryFile("w", suffix=".json") as secure:
            json.dump(asdict(kafka.listeners), secure)
            secure.flush()
            environment = os.environ | {
                "TASKD_TEST_KAFKA": kafka.listeners.plaintext,
                "TASKD_TEST_KAFKA_SECURE": secure.name,
            }
            running = subprocess.Popen(command, env=environment)
            # Ctrl-C reaches the command too; Kafka is stopped after it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: running.terminate())
            return running.wait()
    except Unavailable as error:
        print(f"no Apache Kafka for tests: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
