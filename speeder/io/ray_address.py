"""Checks within seconds that a Ray cluster answers: Ray itself tries for minutes, then ends the process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from speeder.errors import SpeederError

TIMEOUT = 5.0  # seconds
# HTTP/2's connection preface and an empty SETTINGS frame, which a gRPC server answers with its own SETTINGS
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS = 4


def cluster_address(given: str | None) -> tuple[str, str] | None:
    """The cluster that `ray.init` would join: the given one, `RAY_ADDRESS`, or the last that `ray start` started here.

    Returns:
        `host:port`, perhaps with `ray://`, and its source; None if Ray will be started on this machine, or will report
        the error itself.
    """
    if given not in (None, "auto", "local"):
        return given, "as given"
    environment = os.environ.get("RAY_ADDRESS")
    if given == "local" or environment == "local":
        return None
    if environment and environment != "auto":
        return environment, "RAY_ADDRESS"
    started = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    address = started.read_text(encoding="utf-8").strip() if started.is_file() else ""
    return (address, f"from {started}, which `ray stop` removes") if address else None


def check_reachable(given: str | None, timeout: float = TIMEOUT) -> None:
    """Check that the cluster to join speaks gRPC, as Ray does.

    Args:
        given: as in `ray.init`.
        timeout: seconds for the connection, and again for the answer.

    Raises:
        SpeederError: nothing answers, or not by gRPC.
    """
    found = cluster_address(given)
    if found is None:
        return
    address, origin = found
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise SpeederError(
            f"ray: expected an address such as 'auto' or 'host:6379', got {address!r} ({origin})"
        )
    where = f"ray: expected a cluster at {address} ({origin})"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0", "false"):
                connection.sendall(_HELLO)
                answer = connection.recv(9, socket.MSG_WAITALL)
                if len(answer) < 9 or answer[3] != _SETTINGS:
                    raise SpeederError(f"{where}: something other than Ray answers there")
    except (OSError, OverflowError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        raise SpeederError(f"{where}: {reason}") from error
