"""Whether a server can be reached, found out within a time limit."""

import threading
import urllib.error
import urllib.request


def is_reachable(url: str, seconds: float = 2.0) -> bool:
    """Whether an HTTP server at url answers within a number of seconds.

    A name lookup can hang for longer, so it runs in a daemon thread.
    """
    replies = []

    def send_request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds)
            replies.append(True)
        except urllib.error.HTTPError:  # an error status is an answer too
            replies.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=send_request, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(replies)
