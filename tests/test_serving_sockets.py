"""Where the processes of a server talk to each other: on loopback, unless they are on several machines."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
from keys_and_ports import free_port, no_keys  # noqa: F401 - a fixture
from test_serving_plan import make_plan, run  # noqa: F401 - a fixture

from sonovqa import serving_sockets
from sonovqa.serving_sockets import SETTINGS


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def set_by(plan) -> dict[str, str]:
    return {name: value for name, value in plan.env.items() if name in SETTINGS}


@pytest.mark.parametrize(
    "extra",
    [
        "", "--tensor-parallel-size 4", "--data-parallel-size 4 --api-server-count 4", "-dp 2 -dpl 2", "--nnodes 1",
        "--data-parallel-size=4 --data_parallel_size_local=4", "--distributed-executor-backend mp", "--reasoning-parser ray",
    ],
)  # fmt: skip
def test_a_server_on_one_machine_keeps_to_loopback(run, extra):  # noqa: F811
    assert set_by(make_plan(run, device="gpu", extra=tuple(extra.split()))) == SETTINGS
    assert SETTINGS["GLOO_SOCKET_IFNAME"] in [name for _, name in serving_sockets.socket.if_nameindex()]


@pytest.mark.parametrize(
    "extra",
    [
        "--distributed-executor-backend ray", "--distributed_executor_backend=ray", "--data-parallel-backend ray", "-dpb ray",
        "--nnodes 2 --node-rank 0 --master-addr 10.0.0.1", "-n 2", "--nnodes=2", "--node-rank 1", "--headless", "-dpa 10.0.0.1",
        "--data-parallel-size 16 --data-parallel-size-local 8", "-dp 16 -dpl=8", "--data-parallel-hybrid-lb",
        "--data-parallel-addr 10.0.0.1",
    ],
)  # fmt: skip
def test_a_server_on_several_machines_does_not(run, extra):  # noqa: F811
    assert set_by(make_plan(run, device="gpu", extra=tuple(extra.split()))) == {}


def test_what_the_user_set_himself_stays(run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    plan = make_plan(run, device="gpu")
    assert (os.environ | plan.env)["GLOO_SOCKET_IFNAME"] == "ib0"
    assert set_by(plan) == {name: value for name, value in SETTINGS.items() if name != "GLOO_SOCKET_IFNAME"}


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections("tcp")
    return {tuple(one.laddr) for one in found if one.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_that_is_looked_for_on_loopback_listens_there_only(host):
    """As vLLM and torch's rendezvous make it: by name and by position, at any free port and at a given one, shared or not."""
    from torch.distributed import DistNetworkError, TCPStore

    before, wait = listening(), timedelta(seconds=20)
    store = serving_sockets.local(TCPStore)
    first = store(host_name=host, port=0, is_master=True, world_size=-1, wait_for_workers=False)
    client = store(host_name=host, port=first.port, is_master=False, wait_for_workers=False)
    client.set("port", b"1")
    assert first.get("port") == b"1" and isinstance(first, TCPStore)
    port = free_port()
    made = [store(host, port, 1, True, wait, multi_tenant=True), store(host, port, 1, True, wait, multi_tenant=True)]
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):  # upon which vLLM tries another
        store(host, first.port, 1, True, wait)
    assert listening() - before == {("127.0.0.1", first.port), ("127.0.0.1", port)} and len(made) == 2


def test_a_store_for_other_machines_is_torchs_own():
    given = []

    class Store:
        """master_listen_fd"""

        def __init__(self, *words, **named):
            given.append((words, named))

        __init__.__doc__ = "master_listen_fd"

    store = serving_sockets.local(Store)
    store("10.0.0.1", 29500, 2, True)
    store("127.0.0.1", 29500, 2, False)
    store("127.0.0.1", 29500, is_master=True, master_listen_fd=7)
    assert given == [
        (("10.0.0.1", 29500, 2, True), {}),
        (("127.0.0.1", 29500, 2, False), {}),
        (("127.0.0.1", 29500, None, True), {"master_listen_fd": 7}),
    ]


def test_versions_that_do_it_otherwise_are_refused_and_not_trusted(monkeypatch):
    with pytest.raises(RuntimeError, match="takes no socket"):
        serving_sockets.local(object)
    import torch.distributed

    utils = SimpleNamespace(TCPStore=object, create_tcp_store=None)
    monkeypatch.setitem(sys.modules, "vllm.distributed", SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(distributed=sys.modules["vllm.distributed"]))
    with pytest.raises(RuntimeError, match="no longer makes its stores"):
        serving_sockets.check_stores()
    utils.TCPStore = torch.distributed.TCPStore
    serving_sockets.check_stores()
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "TCPStore", object)
    with pytest.raises(RuntimeError, match="of its own"):
        serving_sockets.keep_stores_here()
