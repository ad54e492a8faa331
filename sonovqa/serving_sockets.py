"""Where the processes of a server talk to each other: on loopback, as none of what they open there asks for a key.

Beside its API vLLM opens ports of its own (0.32, by reading and by looking at what listens):

- gloo, in every worker even where there is one only: on the address that the machine's name resolves to, unless
  ``GLOO_SOCKET_IFNAME`` names an interface;
- NCCL, between the GPUs of ``--tensor-parallel-size``: on the first interface that is not loopback, unless
  ``NCCL_SOCKET_IFNAME`` names one;
- torch's `TCPStore`, with ``--data-parallel-size`` above 1, and with one GPU and AITER too: on all interfaces, whatever address
  its clients are told. vLLM puts pickled objects into it (``vllm/distributed/utils.py``), which run code when they are read;
- ZeroMQ and AITER's store: on vLLM's own idea of this machine's address, ``VLLM_HOST_IP``. On one machine ZeroMQ takes sockets of
  the file system instead.

So `settings` names loopback in the environment, and `keep_stores_here` has a store whose clients look for it on loopback listen
there and nowhere else. Over several machines neither would do: these ports must be on a network that the machines have to
themselves, see docs/serving.md. Nothing heavy is imported at the top, as every process of a server reads this file.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
import socket
import sys
from collections.abc import Sequence

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SETTINGS = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK, "VLLM_HOST_IP": "127.0.0.1"}
#: Flags of vLLM that spread a server over machines, and those that say how far; vLLM's short names of them.
ELSEWHERE = (
    "--node-rank", "--master-addr", "--headless", "--data-parallel-address", "--data-parallel-rank", "--data-parallel-start-rank",
    "--data-parallel-hybrid-lb", "--data-parallel-external-lb",
)  # fmt: skip
COUNTED = (
    "--nnodes", "--data-parallel-size", "--data-parallel-size-local", "--distributed-executor-backend", "--data-parallel-backend"
)  # fmt: skip
SHORT = {
    "-n": "--nnodes", "-r": "--node-rank", "-dp": "--data-parallel-size", "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address", "-dpb": "--data-parallel-backend", "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank", "-dph": "--data-parallel-hybrid-lb", "-dpe": "--data-parallel-external-lb",
}  # fmt: skip


def settings(extra: Sequence[str]) -> dict[str, str]:
    """What keeps a server's processes on loopback, as environment; nothing over several machines, nothing that the user set.

    Args:
        extra: flags for vLLM.
    """
    return {} if over_machines(extra) else {name: value for name, value in SETTINGS.items() if not os.environ.get(name)}


def over_machines(extra: Sequence[str]) -> bool:
    """Whether flags for vLLM spread a server over several machines, or over what Ray finds."""
    given = _given(extra)
    if "ray" in (given.get("--distributed-executor-backend"), given.get("--data-parallel-backend")):
        return True
    copies = given.get("--data-parallel-size")
    return (
        any(name in given for name in ELSEWHERE)
        or given.get("--nnodes", "1") != "1"
        or given.get("--data-parallel-size-local", copies) != copies
    )


def _given(extra: Sequence[str]) -> dict[str, str]:
    """The flags above by their whole names: vLLM takes short ones, underscores and unambiguous beginnings too."""
    found = {}
    for word, after in itertools.pairwise([*extra, ""]):
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name.replace("_", "-"))
        known = [flag for flag in (*ELSEWHERE, *COUNTED) if flag == name or (len(name) > 3 and flag.startswith(name))]
        if known:
            found[name if name in known else known[0]] = value if equals else after
    return found


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own. A name that is not ``localhost`` is taken for the world's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local(store: type) -> type:
    """`TCPStore` that listens on loopback where ``host_name`` is loopback, instead of everywhere.

    Raises:
        RuntimeError: if this torch's store cannot be handed a socket.
    """
    if "master_listen_fd" not in (store.__init__.__doc__ or ""):
        raise RuntimeError(
            "torch's TCPStore takes no socket (master_listen_fd) and would listen on all interfaces; torch 2.13 does"
        )

    class LocalStore(store):
        """See `local`."""

        def __init__(self, host_name, port, world_size=None, is_master=False, *more, **named):
            if is_master and is_loopback(host_name) and len(more) < 4 and named.get("master_listen_fd") is None:
                port, named["master_listen_fd"] = listen(host_name, port)
            super().__init__(host_name, port, world_size, is_master, *more, **named)

    return LocalStore


def listen(host: str, port: int) -> tuple[int, int | None]:
    """Port and file descriptor of a socket that listens on ``host``; the store closes it.

    No descriptor if the port is taken: it may be this very process's, which the store knows and shares, and the store's own error
    is the one that vLLM waits for to try another.
    """
    name = "127.0.0.1" if host == "localhost" else host
    try:
        made = socket.create_server((name, port), family=socket.AF_INET6 if ":" in name else socket.AF_INET, backlog=1024)
    except OSError as fault:
        if fault.errno != errno.EADDRINUSE:
            raise
        return port, None
    return made.getsockname()[1], made.detach()


def keep_stores_here() -> None:
    """Put `local` in the place of torch's store, in this process, before vLLM takes it from there. Raises as `local` does."""
    import torch.distributed

    rendezvous = sys.modules["torch.distributed.rendezvous"]  # the package's attribute of that name is a function
    if rendezvous.TCPStore is not torch.distributed.TCPStore:
        raise RuntimeError("torch's rendezvous has a TCPStore of its own that would listen on all interfaces; torch 2.13 has not")
    if torch.distributed.TCPStore.__name__ != "LocalStore":
        torch.distributed.TCPStore = rendezvous.TCPStore = local(torch.distributed.TCPStore)


def check_stores() -> None:
    """Raise `RuntimeError` if vLLM makes its stores otherwise than `keep_stores_here` knows."""
    import torch.distributed
    from vllm.distributed import utils

    if getattr(utils, "TCPStore", None) is not torch.distributed.TCPStore or not hasattr(utils, "create_tcp_store"):
        raise RuntimeError("vLLM no longer makes its stores in vllm/distributed/utils.py; see sonovqa/serving_sockets.py")
