"""Broker, worker and commands that know a secret and each other's certificates, and strangers that do not."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
from daemons import Daemons, open_daemons

trustme = pytest.importorskip("trustme")

pytestmark = [pytest.mark.process, pytest.mark.slow]

SECRET, OTHER, ORDERS = "correct horse battery staple", "incorrect horse", "who may give orders"


def write_certificates(folder: Path) -> dict[str, str]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, host in (("broker", "127.0.0.1"), ("client", "client.test")):
        authority.issue_cert(host).private_key_and_cert_chain_pem.write_to_path(folder / f"{name}.pem")
    return {name: str(folder / f"{name}.pem") for name in ("ca", "broker", "client")}


async def submit(daemons: Daemons, address: str, more: Mapping[str, str]) -> tuple[int, str]:
    """Its exit code and what it said."""
    arguments = ("submit", "demo:add", "--kwargs", '{"a": 2, "b": 3}', "--broker", address)
    command = daemons.start(*arguments, "--wait", "--timeout", "20", more=more)
    return await command.ended(), command.tail()


async def test_a_task_runs_over_mutual_tls_with_signed_calls(tmp_path: Path) -> None:
    files = write_certificates(tmp_path)
    mine = {"TASKD_SECRET": SECRET, "TASKD_TLS_CA": files["ca"]}
    mine |= {"TASKD_TLS_CERTIFICATE": files["client"], "TASKD_TLS_KEY": files["client"]}
    (tmp_path / "broker.yaml").write_text(
        json.dumps(
            {
                "data_dir": str(tmp_path / "data"),
                "rpc": {
                    "port": 0,
                    "secrets": [SECRET],
                    "tls": {
                        "certificate": files["broker"],
                        "key": files["broker"],
                        "client_ca": files["ca"],
                    },
                },
                "http": {"port": 0},
                "admin": {"secrets": [ORDERS]},
            }
        )
    )
    async with open_daemons(tmp_path) as daemons:
        broker = daemons.start("broker", "--config", str(tmp_path / "broker.yaml"))
        address = str((await broker.said("broker listens"))["rpc"])
        for secret, name in ((SECRET, "knowing"), (OTHER, "unknowing")):
            (tmp_path / f"{name}.yaml").write_text(
                json.dumps(
                    {
                        "pools": {
                            "default": {
                                "brokers": [address],
                                "slots": 1,
                                "secrets": [secret],
                                "tls": {
                                    "ca": files["ca"],
                                    "certificate": files["client"],
                                    "key": files["client"],
                                },
                            }
                        }
                    }
                )
            )
        unknowing = daemons.start("worker", "--config", str(tmp_path / "unknowing.yaml"))
        assert "Authentication failed" in (await unknowing.said("broker lost"))["error"]
        knowing = daemons.start("worker", "--config", str(tmp_path / "knowing.yaml"))
        await broker.said("worker connected")
        assert len(broker.entries("worker connected")) == 1

        code, said = await submit(daemons, address, mine)
        assert code == 0, said
        for strange, why in (
            (mine | {"TASKD_SECRET": OTHER}, "UNAUTHENTICATED: Authentication failed"),
            ({**mine, "TASKD_SECRET": ""}, "UNAUTHENTICATED: Authentication failed"),
            ({"TASKD_SECRET": SECRET}, ""),
            ({"TASKD_SECRET": SECRET, "TASKD_TLS": "true"}, "certificate"),
        ):
            code, said = await submit(daemons, address, {"TASKD_TIMEOUT_S": "1", **strange})
            assert code == 1, said
            assert why in said
        for secret, why in (
            (SECRET, "failed: is TASKD_ADMIN_SECRET one of admin.secrets"),  # who may work may not order
            (ORDERS, "never-heard-of  unknown to this broker"),
        ):
            order = ("cancel", "never-heard-of", "--reason", "why", "--address", address)
            command = daemons.start(*order, more={**mine, "TASKD_ADMIN_SECRET": secret})
            assert await command.ended() == 1
            assert why in command.tail()

        # Renewed by another authority, which is also the only one that is trusted from now on.
        (tmp_path / "new").mkdir()
        new = write_certificates(tmp_path / "new")
        for name in ("ca", "broker"):
            shutil.copyfile(new[name], files[name])
        broker.send(signal.SIGHUP)
        await broker.said("configuration reloaded")
        code, said = await submit(daemons, address, mine | {"TASKD_TIMEOUT_S": "1"})
        assert code == 1, said
        mine |= {"TASKD_TLS_CERTIFICATE": new["client"], "TASKD_TLS_KEY": new["client"]}
        code, said = await submit(daemons, address, mine)
        assert code == 0, said
        assert await knowing.stopped() == 0
        await unknowing.stopped()
        assert await broker.stopped() == 0
        for daemon in daemons.all:
            assert not [line for line in daemon.lines if SECRET in line or OTHER in line or ORDERS in line]


@pytest.mark.parametrize(
    ("tls", "sentence"),
    [
        (
            {"certificate": "nowhere.pem", "key": "nowhere.pem"},
            "TLS: the certificate nowhere.pem cannot be read",
        ),
        ({"certificate": "nowhere.pem"}, "`rpc.tls.key`"),
    ],
)
async def test_a_broker_with_wrong_files_says_which(
    tmp_path: Path, tls: Mapping[str, str], sentence: str
) -> None:
    (tmp_path / "broker.yaml").write_text(
        json.dumps({"data_dir": str(tmp_path / "data"), "rpc": {"tls": tls}, "http": {"port": 0}})
    )
    async with open_daemons(tmp_path) as daemons:
        broker = daemons.start("broker", "--config", str(tmp_path / "broker.yaml"))
        assert await broker.ended() == 78
        assert sentence in broker.tail()
        assert "Traceback" not in broker.tail()
