"""A local server with OpenAI's API: in a thread, or as a command: PORT REPLY [how it fails]."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """Answers requests with what `reply` makes of their bodies, and keeps what was asked.

    A reply is the text of a chat model, a status with headers and content, or other content; None never comes.
    starts is the number of times that it fails to answer before it seems to have started.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[Any], Any], port: int = 0, starts: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.reply, self.starts = reply, starts
        self.asked: list[Any] = []
        self.answered: list[Any] = []
        self.paths: set[str] = set()
        self.keys: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self):
        self.server.starts -= 1
        self.send(200 if self.server.starts < 0 else 503, {}, {"data": []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.paths.add(self.path)
        self.server.keys.add(self.headers.get("Authorization"))
        reply = self.server.reply(body)
        if reply is None:
            threading.Event().wait()
        if isinstance(reply, str):
            reply = {"choices": [{"message": {"content": reply}}]}
        self.server.answered.append(body)
        self.send(*reply if isinstance(reply, tuple) else (200, {}, reply))

    def send(self, status: int, headers: dict[str, str], content: Any):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args):
        pass


@contextmanager
def serve(reply: Callable[[Any], Any], **options: int) -> Iterator[FakeServer]:
    with FakeServer(reply, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    port, content, failure = int(sys.argv[1]), json.loads(sys.argv[2]), (*sys.argv[3:], "")[0]
    print("loading", sys.argv[4:], flush=True)
    if failure == "dies at once":
        sys.exit("no memory\nis left")
    if failure == "never answers":
        time.sleep(3600)
    server = FakeServer(lambda body: content, port)
    if failure == "dies later":
        server.reply = lambda body: content if len(server.asked) < 3 else os._exit(9)
    server.serve_forever()
