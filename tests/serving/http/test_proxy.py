"""The nginx configuration of docs/operations.md, run as it is written, in front of a real server."""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.serving.http.browser import browser
from tests.serving.http.worlds import listening, served_model

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "operations.md"
SOON = 120


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def as_documented(port: int, upstream: str) -> str:
    """The document's configuration with another address to listen at, without TLS, and with the server's own."""
    text = re.search(r"```nginx\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "listen 443 ssl;" in text and "server 127.0.0.1:8000;" in text
    text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8000", upstream)
    return re.sub(r"^\s*ssl_certificate.*\n", "", text, flags=re.MULTILINE)


@pytest.fixture
def proxied(tmp_path):
    """The address of the page behind nginx."""
    nginx = shutil.which("nginx")
    if nginx is None:
        if os.environ.get("CI"):
            pytest.fail("no nginx on the path; .ci/run installs it")
        pytest.skip("no nginx on the path")
    with listening(served_model(tmp_path / "pictures")) as address:
        port = free_port()
        places = "\n".join(
            f"{name}_temp_path {tmp_path};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        as_root = "user root;" if os.geteuid() == 0 else ""
        config = tmp_path / "nginx.conf"
        config.write_text(
            f"{as_root} daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;\nevents {{}}\n"
            f"http {{ access_log off; {places}\n{as_documented(port, address.removeprefix('http://'))}\n}}\n"
        )
        command = [nginx, "-p", str(tmp_path), "-e", str(tmp_path / "error.log"), "-c", str(config)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            until = time.monotonic() + SOON
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/films/v1/model", timeout=SOON).raise_for_status()
                    break
                except httpx.HTTPError:
                    assert process.poll() is None, process.stdout.read()
                    assert time.monotonic() < until
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/films/"
        finally:
            process.terminate()
            process.wait(SOON)


@pytest.mark.slow
def test_the_documented_proxy_serves_page_and_api_under_its_prefix(proxied):
    with httpx.Client(base_url=proxied, timeout=SOON) as client:
        found = client.post("v1/recommend", json={"history": ["i1"], "k": 3})
        assert found.status_code == 200 and len(found.json()["items"]) == 3
        picture = client.get("v1/items", params={"q": "toy"}).json()["items"][0]["picture"]
        assert client.get(picture).headers["content-type"] == "image/jpeg"
        assert (
            client.get(client.get("v1/items", params={"q": "amelie"}).json()["items"][0]["id"]).status_code
            == 404
        )
        for inside in ("metrics", "healthz", "readyz"):
            assert client.get(inside).status_code == 404
        assert client.post("v1/recommend", content=b"x" * 70_000).status_code == 413
    with browser() as chromium:
        page = chromium.new_page()
        page.set_default_timeout(1000 * SOON)
        page.goto(proxied + "#i1,i2")
        expect(page.locator(".card .shares")).to_have_count(12, timeout=1000 * SOON)
        page.goto(proxied + "docs")
        expect(page.locator(".opblock")).to_have_count(8, timeout=1000 * SOON)
    statuses = {httpx.get(proxied + "v1/model", timeout=SOON).status_code for _ in range(3)}
    assert statuses <= {200, 429}
