"""A stand-in for W&B's server: as much of its HTTP as wandb 0.31 needs to start, resume and stream a run."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """silent: answer nobody any more. known: the step in the summary of a run that is there already, or None."""

    daemon_threads = True

    def __init__(self, known: int | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.silent = False
        self.known = known
        self.history: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            for name, part in (request.get("files") or {}).items():
                if "history" in name:
                    self.history += [json.loads(line) for line in part["content"]]
            return {"limits": {}}
        run = {
            **{"id": "1", "name": "run", "displayName": "run", "config": "{}", "sweepName": None},
            "project": {"id": "2", "name": "megatron-lowbit", "entity": {"id": "3", "name": "me"}},
        }
        if self.known is not None:
            run |= {
                **{"summaryMetrics": json.dumps({"step": self.known, "_step": self.known}), "tags": []},
                **{"historyLineCount": self.known + 1, "eventsLineCount": 0, "logLineCount": 0},
                **{"historyTail": json.dumps([json.dumps({"_step": self.known})]), "eventsTail": "[]"},
            }
            run["wandbConfig"] = json.dumps({"t": 1})
        return {
            "data": {
                "model": {"bucket": run if self.known is not None else None},
                "upsertBucket": {"bucket": run, "inserted": self.known is None},
                "viewer": {"id": "3", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
                "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
            }
        }


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        while self.server.silent:
            time.sleep(0.05)
        self._reply(self.server.answer(self.path, json.loads(body or b"{}")))

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._reply({})

    def _reply(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server(known: int | None = None) -> Iterator[Server]:
    with Server(known) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.silent = False
            server.shutdown()
