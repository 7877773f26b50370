"""The addresses on which a worker group listens. Runs in a separate process, because it changes torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

ALONE = """
import json, os, sys
import psutil, ray.util, torch
import torch.distributed as dist
from corsa.training.rendezvous import _listen_on_node_address

ray.util.get_node_ip_address = lambda: sys.argv[1]

def listening():
    return sorted({c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN})

_listen_on_node_address()
dist.init_process_group("gloo", init_method="env://", rank=0, world_size=1)
total = torch.ones(2)
dist.all_reduce(total)
during = listening()
dist.destroy_process_group()
print(json.dumps([during, listening(), total.tolist(), os.environ.get("NCCL_SOCKET_IFNAME")]))
"""


def listening(*, at: str, node: str) -> list[object]:
    """The addresses on which a group of one worker listens, with its rendezvous and its node at an address."""
    environment = os.environ | {"MASTER_ADDR": at, "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    if node.startswith("127."):
        del environment["GLOO_SOCKET_IFNAME"]
    ran = subprocess.run([sys.executable, "-c", ALONE, node], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_on_one_machine_nothing_listens_beyond_it() -> None:
    during, after, total, interface = listening(at="127.0.0.1", node="127.0.0.1")
    assert during == ["127.0.0.1"]
    assert after == []
    assert total == [1.0, 1.0]
    assert interface == "lo"


def test_on_several_the_store_listens_on_its_nodes_address_alone() -> None:
    during, _, _, interface = listening(at="127.0.0.2", node="192.0.2.1")
    assert during == ["127.0.0.1", "127.0.0.2"]  # gloo on the given interface, and the store
    assert interface is None
