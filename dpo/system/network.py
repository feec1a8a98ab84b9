"""Whether a server can be reached, decided in a bounded time."""

import threading
import urllib.error
import urllib.request


def is_reachable(url: str, seconds: float = 2.0) -> bool:
    """Return whether an HTTP server answers at url within a number of seconds.

    A name look-up can hang for longer, so a daemon thread does it.
    """
    replies = []

    def attempt() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds)
            replies.append(True)
        except urllib.error.HTTPError:  # an error status is a reply too
            replies.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(replies)
