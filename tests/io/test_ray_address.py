"""A cluster that does not answer is told within seconds, before Ray would try for minutes."""

import socket
import threading
import time

import pytest

from speeder.cli.main import main
from speeder.errors import SpeederError
from speeder.io.ray import OnRay
from speeder.io.ray_address import check_reachable, cluster_address

SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@pytest.fixture(autouse=True)
def nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def refused_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def answering():
    """Starts a server that answers a connection's first bytes; gives its address."""
    servers = []

    def start(answer):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(64)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in servers:
        server.close()


def test_a_closed_port_is_told_in_a_line_by_the_command(tmp_path, capsys):
    address = f"127.0.0.1:{refused_port()}"
    command = ["recommend", str(tmp_path), "--histories", "in.parquet", "--out", "out.parquet"]
    assert main([*command, "--ray", address]) == 1
    line = f"speeder: ray: expected a cluster at {address} (as given): Connection refused\n"
    assert capsys.readouterr().err == line
    began = time.monotonic()
    with pytest.raises(SpeederError, match="refused"):
        OnRay(address)
    assert time.monotonic() - began < 10


def test_what_listens_and_says_nothing(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(SpeederError, match=r"\(RAY_ADDRESS\): no answer"):
            check_reachable("auto", timeout=0.3)


def test_what_answers_otherwise_is_no_ray(answering):
    check_reachable(answering(SETTINGS))
    check_reachable(f"ray://{answering(SETTINGS + b'more')}")
    for answer in (b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP", b""):
        with pytest.raises(SpeederError, match="something other than Ray"):
            check_reachable(answering(answer))


def test_a_cluster_that_is_gone_but_for_its_file(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{refused_port()}")
    for given in (None, "auto"):
        with pytest.raises(
            SpeederError, match=r"ray_current_cluster, which `ray stop` removes\): Connection ref"
        ):
            OnRay(given)
    assert cluster_address("local") is None


def test_which_cluster_is_meant(monkeypatch):
    assert cluster_address(None) is None and cluster_address("auto") is None
    monkeypatch.setenv("RAY_ADDRESS", "a:1")
    assert (
        cluster_address(None)[0] == cluster_address("auto")[0] == "a:1" != cluster_address("b:2")[0] == "b:2"
    )
    monkeypatch.setenv("RAY_ADDRESS", "local")
    check_reachable(None)


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:port"])
def test_no_address(address):
    with pytest.raises(SpeederError, match="expected an address such as"):
        check_reachable(address)
