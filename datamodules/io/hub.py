"""Tell quickly that the Hugging Face hub cannot be reached, where its client would try again for most of a minute."""

from __future__ import annotations

import socket
import threading
import urllib.request
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants

_WAIT_S = 5.0


def use_cache_without_network() -> str | None:
    """Let the hub's client read its cache only, if the hub cannot be reached; the result of the first call is kept.

    Returns:
        The reason, for messages; None if the hub can be reached, or if ``HF_HUB_OFFLINE`` is set anyway.
    """
    if constants.HF_HUB_OFFLINE and not _is_unreachable.cache_info().currsize:
        return None
    if not _is_unreachable():
        return None
    constants.HF_HUB_OFFLINE = True
    return f"{constants.ENDPOINT} cannot be reached, and it is not in the cache"


@cache
def _is_unreachable() -> bool:
    endpoint = urlsplit(constants.ENDPOINT)
    host = endpoint.hostname or ""
    proxy = urllib.request.getproxies().get(endpoint.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        endpoint = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443))
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, _WAIT_S).close()
        except OSError:
            return
        reached.set()

    # In a thread, since looking the name up knows no time limit.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_WAIT_S)
    return not reached.is_set()
