"""Through what a parent and its ranks speak: one `TCPStore` of the parent, also the rendezvous of torch.distributed.

It has no password: whoever reaches its port can write to it. So it listens on the loopback interface, unless ranks run
on other nodes; then the network between them must be trusted, as it must be for gloo and NCCL themselves.
"""

import socket
from datetime import timedelta

from torch.distributed import PrefixStore as PrefixStore  # type: ignore[attr-defined]  # exported all the same
from torch.distributed import TCPStore as TCPStore  # type: ignore[attr-defined]

from headrace.errors import UserError
from headrace.launch.wire import Meeting

_TIMEOUT = timedelta(seconds=60)


def connect(meeting: Meeting) -> TCPStore:
    """A connection of its own: a blocking read on one does not hold up another."""
    return TCPStore(meeting.host, meeting.port, is_master=False, timeout=_TIMEOUT)


def host_store(nodes: int) -> tuple[TCPStore, str]:
    """A store that listens on a port of the system's choice, and the address under which ranks reach it.

    Raises `UserError` where other nodes could not reach this host by its name.
    """
    host = "127.0.0.1" if nodes == 1 else socket.gethostbyname(socket.gethostname())
    if nodes > 1 and host.startswith("127."):
        raise UserError(
            f"launch.start=srun on {nodes} nodes: this host's name {socket.gethostname()} resolves to {host}, which "
            "other nodes cannot reach; give it its network address in /etc/hosts or DNS"
        )
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(4096)
    port = listener.getsockname()[1]
    # By itself a TCPStore listens on every interface.
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )
    return store, host
