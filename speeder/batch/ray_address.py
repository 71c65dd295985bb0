"""Whether a Ray cluster answers at all, found out in seconds: Ray itself tries for minutes, then ends the process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from speeder.errors import SpeederError

TIMEOUT = 5.0  # seconds
# HTTP/2's connection preface and an empty SETTINGS frame, which a gRPC server answers with its own SETTINGS
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS = 4


def cluster_address(given: str | None) -> str | None:
    """Which cluster `ray.init` would join: the given one, `RAY_ADDRESS`, or the last that `ray start` started here.

    Returns:
        `host:port`, perhaps behind `ray://`; None where Ray is to be started, or to say itself what is wrong.
    """
    address = given if given not in (None, "auto") else os.environ.get("RAY_ADDRESS") or given
    if address in (None, "auto"):
        started = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        address = started.read_text(encoding="utf-8").strip() if started.is_file() else None
    return None if address == "local" else address or None


def check_reachable(address: str, timeout: float = TIMEOUT) -> None:
    """Check that something speaks gRPC there, as Ray does.

    Args:
        address: as `cluster_address` gives it.
        timeout: in seconds, for the connection and again for the answer.

    Raises:
        SpeederError: nobody does.
    """
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise SpeederError(f"ray: expected an address such as 'auto' or 'host:6379', got {address!r}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0", "false"):
                connection.sendall(_HELLO)
                answer = connection.recv(9, socket.MSG_WAITALL)
                if len(answer) < 9 or answer[3] != _SETTINGS:
                    raise SpeederError(f"ray: expected a cluster at {address}: what answers there is no Ray")
    except (OSError, OverflowError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        raise SpeederError(f"ray: expected a cluster at {address}: {reason}") from error
