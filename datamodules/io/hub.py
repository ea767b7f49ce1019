"""Names of the Hugging Face hub, and a quick answer whether it can be reached.

The hub's own client would try again for most of a minute.
"""

from __future__ import annotations

import re
import shlex
import socket
import threading
import urllib.request
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

_WAIT_S = 5.0
_HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"


def is_hub_name(name: str) -> bool:
    """Return True if a name means a repository of the Hugging Face hub: ``owner/name``, and no such folder exists.

    Every other name means a local folder, for which the network is not used.
    """
    return re.fullmatch(_HUB_NAME, name, re.ASCII) is not None and not Path(name).is_dir()


def download_command(path: Path) -> str | None:
    """Return the command that downloads a repository of the Hugging Face hub to the folder ``.../<owner>/<name>``.

    Returns:
        None if the folder's last two components do not look like a repository's. They do below a folder ``weights``;
        elsewhere the name needs a capital, a hyphen or a dot, which folders that this project writes lack.
    """
    repository = "/".join(path.parts[-2:])
    released = path.parts[-3:-2] == ("weights",) or re.search("[A-Z.-]", path.name)
    if not (released and re.fullmatch(_HUB_NAME, repository, re.ASCII)):
        return None
    return f".venv/bin/hf download {repository} --local-dir {shlex.quote(str(path))}"


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
