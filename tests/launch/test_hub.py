"""Names that are no folder are looked for on the hub once, and one that is not there is told at once.

A server of the test's own answers as the hub does, and counts how often it is asked.
"""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from megatron_lowbit.config import GenerateConfig, LowBitError
from megatron_lowbit.io.gptq_text import gptq_windows
from megatron_lowbit.io.hub import check_on_hub
from megatron_lowbit.io.texts import check_source
from megatron_lowbit.launch.inputs import check_inputs
from megatron_lowbit.launch.model_folder import download

pytestmark = pytest.mark.quick
ANSWERS = {"there": (200, ""), "missing": (401, "RepoNotFound"), "gated": (403, "GatedRepo"), "busy": (503, "")}


class Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        folder, _, name = self.path.rpartition("/")
        status, code = ANSWERS.get(name, (404, ""))
        if folder.endswith("/owner"):  # the client asks for other things too
            self.asked.append(self.path)
        body = b'{"id": "owner/there"}' if status == 200 else b"{}"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The hub's client as it is without HF_HUB_OFFLINE, with an empty cache."""
    huggingface_hub.close_session()  # the one that conftest's HF_HUB_OFFLINE made
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    check_on_hub.cache_clear()
    yield monkeypatch
    huggingface_hub.close_session()
    check_on_hub.cache_clear()


@pytest.fixture
def hub(online):
    Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield Hub.asked
        server.shutdown()


def start(model):
    check_inputs("generate", GenerateConfig(model=model))


@pytest.mark.parametrize("name", ["there", "gated", "busy"])
def test_what_the_client_can_go_on_with(hub, name):
    start(f"owner/{name}")
    start(f"owner/{name}")
    assert hub == [f"/api/models/owner/{name}"]  # asked once for both


def test_a_name_that_the_hub_does_not_have(hub):
    with pytest.raises(LowBitError, match=r"^model='owner/missing' is not here, and .* has no model of that name, or"):
        start("owner/missing")
    with pytest.raises(LowBitError, match=r"^calibration\.data='owner/missing' is not .* has no dataset of that name"):
        check_source("owner/missing:config:test", "calibration")
    assert hub == ["/api/models/owner/missing", "/api/datasets/owner/missing"]


def test_a_hub_that_cannot_be_reached(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    online.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    tries: list[float] = []
    online.setattr("time.sleep", tries.append)  # the client's, between its retries
    for ask in (
        lambda: start("owner/model"),
        lambda: download("owner/model"),
        lambda: check_source("text", "evaluation"),
        wikitext,
    ):
        with pytest.raises(LowBitError, match=r"is not here, and http://127\.0\.0\.1:.* cannot be asked for it \("):
            ask()
    assert not tries


def wikitext():
    gptq_windows(None, "gptq:wikitext2", 8)


def test_what_is_no_hub_id_is_not_asked_for(hub):
    with pytest.raises(LowBitError, match=r"^model='two words' is not here, and it is no hub id either"):
        start("two words")
    assert not hub


def test_what_is_in_the_cache_is_not_asked_for(hub, tmp_path):
    folder = tmp_path / "cache" / "models--owner--cached"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    start("owner/cached")
    assert not hub


def test_offline_is_told():
    with pytest.raises(LowBitError, match=r"^model='owner/away' is not here, and .*offline mode is enabled"):
        start("owner/away")
