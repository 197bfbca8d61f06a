"""What operators can do with a broker: the file of switches, the socket for orders, their effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
import trio
from pydantic import SecretStr

from taskd.admin.cancel import CancelOrders
from taskd.admin.orders import SERVICE, Orders
from taskd.admin.switch_file import FollowSwitchFile
from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.daemon.demoting import Demoting
from taskd.inflight.writer import Inflight
from taskd.log.base import Log, Publish
from taskd.rpc.base import Services
from taskd.rpc.server import serve_unix
from taskd.upkeep.duties import Duty
from taskd.upkeep.forbidden import ForbiddenRows
from taskd.upkeep.switches import StopLeases, switch_duties

SOCKET_FILE = "admin.sock"

log = structlog.get_logger("taskd.broker")


def socket_path(config: BrokerConfig) -> Path:
    """Where the broker of this configuration takes orders."""
    return config.admin.socket or config.data_dir / SOCKET_FILE


class Operators:
    """`run` serves them; `duties` belong to upkeep, `rpc_services` to the broker's RPC listener."""

    def __init__(
        self,
        config: BrokerConfig,
        clock: Clock,
        inflight: Inflight,
        own_logs: Mapping[str, Log],
        own: Publish,
        stop_leases: StopLeases,
        forbidden: ForbiddenRows,
    ) -> None:
        self._config = config
        orders, cancels = Orders(inflight, clock), CancelOrders(inflight, stop_leases)
        self._services: Services = {**orders.services, **cancels.services}
        self._demoting = Demoting(config, inflight, own_logs, own)
        self._file = FollowSwitchFile(
            inflight,
            config.switches.file,
            poll_s=config.switches.poll_s,
            may_demote_to=self._demoting.refusal,
        )
        self.duties: Sequence[Duty] = switch_duties(
            inflight,
            self._demoting.append,
            clock,
            stop_leases,
            forbidden,
            limit=config.upkeep.max_rows_per_round,
            every_s=lambda: self._config.upkeep.interval_s,
            strict_order_namespaces=frozenset(config.dispatch.strict_order_namespaces),
        )

    @property
    def rpc_services(self) -> Services:
        """Orders over the network are taken only under secrets of their own."""
        return self._services if self._config.admin.secrets else {}

    @property
    def rpc_secrets(self) -> Mapping[str, Sequence[SecretStr]]:
        return {SERVICE: self._config.admin.secrets} if self._config.admin.secrets else {}

    def reload(self, config: BrokerConfig) -> None:
        """This configuration holds from now on; read the file of switches now."""
        self._config = config
        self._file.reload()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once orders are taken and the file's switches hold. Raises StartupError, StoreError."""
        path = socket_path(self._config)
        async with serve_unix(self._services, path), trio.open_nursery() as nursery:
            nursery.start_soon(self._demoting.run)
            await self._file.look()
            log.info("orders are taken", socket=str(path))
            task_status.started()
            await self._file.run()
