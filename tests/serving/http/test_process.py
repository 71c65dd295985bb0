"""`speeder serve` as a process: it starts, bears a load, ends when told to, and says plainly why it cannot start."""

import asyncio
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from benchmarks.serve_load import run_load
from speeder.cli.main import main
from tests.serving.http.worlds import TITLES, ServerProcess, served_model

SOON = 120
DRAIN = 1  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    served_model().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_server_bears_many_clients_and_stops_gracefully(folder):
    """200 clients for a minute: no error, memory as before; then SIGTERM while requests are on their way."""
    with (
        ThreadPoolExecutor(4) as pool,
        ServerProcess(folder, "--drain-s", str(DRAIN), "--name", "films") as server,
    ):
        load = asyncio.run(run_load(server.address, clients=200, seconds=60, warm_up=5))
        assert load.errors == 0 and load.statuses["200"] > 1000, load.summary()
        assert load.batch > 1, load.summary()
        assert load.memory_after < load.memory_before + 40 * 2**20, load.summary()

        answers, ends = [], []

        def ask():
            """Ask until the port is closed: then requests are refused, or reset where they are on their way."""
            with httpx.Client(base_url=server.address, timeout=SOON) as client:
                while True:
                    try:
                        answer = client.post("/v1/recommend", json={"history": ["i1"], "k": 3})
                    except (httpx.NetworkError, httpx.RemoteProtocolError):
                        ends.append(time.monotonic())
                        return
                    answers.append(answer.status_code)

        askers = [pool.submit(ask) for _ in range(4)]
        with httpx.Client(base_url=server.address, timeout=SOON) as client:
            while len(answers) < 8 and not any(asker.done() for asker in askers):
                time.sleep(0.01)
            told = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            stopping = client.get("/readyz")
            while stopping.status_code == 200:
                stopping = client.get("/readyz")
            assert stopping.json() == {"status": "stopping"}
            assert client.post("/v1/recommend", json={"history": ["i1"], "k": 3}).status_code == 200
        server.output.append(server.process.communicate(timeout=SOON)[0])
        for asker in askers:
            asker.result(SOON)  # raises what the thread raised
        assert server.process.returncode == 0
        assert set(answers) == {200}
        assert min(ends) > told + DRAIN / 2, "it takes requests while it drains"
        assert server.output[-1].strip() == "stopped"


@pytest.mark.slow
def test_a_second_signal_ends_the_drain(folder):
    with ServerProcess(folder, "--drain-s", "600") as server:
        assert httpx.get(server.address + "/v1/model", timeout=SOON).json()["items"] == len(TITLES)
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(server.address + "/readyz", timeout=SOON).status_code == 200:
            time.sleep(0.05)
        assert server.stop(signal.SIGINT, within=SOON) == 0


def test_what_cannot_be_served_gets_one_line(folder, tmp_path, capsys):
    def refused(*arguments):
        assert main(["serve", *map(str, arguments)]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        return lines[-1]

    assert "found no model in it" in refused(tmp_path / "none")
    assert "max_k: expected at least 1, got 0" in refused(folder, "--max-k", 0)
    assert "--threads: expected at least 1" in refused(folder, "--threads", 0)
    assert "--port: expected 0..65535, got 70000" in refused(folder, "--port", 70000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in refused(folder, "--port", taken.getsockname()[1])
    other = tmp_path / "sasrec"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "expected a Speeder model, got one of type 'llama'" in refused(other)


def test_a_model_that_holds_code_runs_none_of_it(folder, tmp_path, capsys):
    """`auto_map` names code in the folder, and there is a pickle: neither is looked at."""
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (copy / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    (copy / "pytorch_model.bin").write_bytes(b"cbuiltins\nopen\n(X" + len(str(ran)).to_bytes(4, "little"))
    from speeder.baselines.auto import load_model

    assert len(load_model(copy).catalogue) == len(TITLES)
    (copy / "model.safetensors").unlink()
    assert main(["serve", str(copy), "--port", "0"]) == 1
    assert "model.safetensors" in capsys.readouterr().err
    assert not ran.exists()
