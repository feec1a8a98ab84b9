"""Servers that answer late."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dpo.system.network import is_reachable


@pytest.mark.parametrize("seconds, reachable", [(0.1, False), (60.0, True)])
def test_a_server_is_waited_for_no_longer_than_its_seconds(seconds, reachable):
    """It answers after a second, or once nobody waits for it any more."""
    asked_no_more = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked_no_more.wait(1)
            self.send_error(503)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert is_reachable(f"http://127.0.0.1:{server.server_port}", seconds) == reachable
        asked_no_more.set()
        server.shutdown()
