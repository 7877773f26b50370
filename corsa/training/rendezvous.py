"""The rendezvous of a worker group. It listens only on the address by which Ray knows the node."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class Rendezvous(TorchConfig):
    """Ray Train's TorchConfig, but torch's store does not listen on every address of its node: anyone who reaches the
    store can write to it. On a single machine that Ray knows as 127.0.0.1, everything listens only there.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, group: Any, backend_config: TorchConfig) -> None:
        group.execute(_listen_on_node_address)
        super().on_start(group, backend_config)

    def on_shutdown(self, group: Any, backend_config: TorchConfig) -> None:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # not 30 s: no answer comes
        super().on_shutdown(group, backend_config)


def _listen_on_node_address() -> None:
    """Make torch's store in this process listen on the node's address. On the loopback address, gloo and NCCL too."""
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
    if get_node_ip_address().startswith("127."):  # by default they choose an interface that others can reach
        (loopback,) = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
