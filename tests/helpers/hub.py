# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""A Hub on this machine, for uploads."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload of small files asks for."""

    def do_GET(self):
        self.server.requests.append(("GET", self.path, self.headers["authorization"], None))
        self.answer({"id": "user/tiny", "private": self.server.is_private})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.requests.append(("POST", self.path, self.headers["authorization"], lines))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.endpoint}/user/tiny"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/commit/main"):
            self.answer({"commitUrl": f"{self.server.endpoint}/user/tiny/commit/1", "commitOid": "1", "success": True})
        else:
            self.send_error(404)

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def hub_on_this_machine():
    """A server, its `endpoint` and the `requests` that it got: method, path, authorization, lines of JSON or None."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.requests, server.is_private = [], True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def uploaded(requests):
    """Path -> bytes of what the one commit among these requests brings."""
    [lines] = [lines for _, path, _, lines in requests if path.endswith("/commit/main")]
    files = [line["value"] for line in lines if line["key"] == "file"]
    assert {file["encoding"] for file in files} == {"base64"} and len(files) == len(lines) - 1
    return {file["path"]: base64.b64decode(file["content"]) for file in files}
