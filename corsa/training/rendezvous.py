"""Where the workers of a group meet: on the address by which their nodes know each other, and on no other of theirs."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class Meeting(TorchConfig):
    """Ray Train's, but that torch's store does not listen on all addresses of its node: whoever reaches it can write to
    it. On a cluster of one machine, which knows itself as 127.0.0.1, nothing listens beyond that.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_listen_where_it_is_called)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # not 30: one that hangs answers nothing
        super().on_shutdown(worker_group, backend_config)


def _listen_where_it_is_called() -> None:
    """In this process torch's store listens on the address that its node is known by, and where that is this machine's
    own, gloo and NCCL do too.
    """
    from ray.util import get_node_ip_address

    rendezvous: Any = import_module("torch.distributed.rendezvous")  # its package has a function of the same name

    def store(hostname: str, port: int, rank: int, world_size: int, timeout: Any, use_libuv: bool = True) -> Any:
        family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
        listening = socket.create_server((hostname, port), family=family) if rank == 0 else None
        return rendezvous.TCPStore(
            hostname,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=listening.detach() if listening else None,  # the store closes it
            use_libuv=use_libuv,
        )

    rendezvous._create_c10d_store = store
    if get_node_ip_address().startswith("127."):  # they would take an interface that others reach
        (loopback,) = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
