"""What the Hub, or the way to it, answered, in a few words a user can act on."""

from __future__ import annotations

import re
from typing import Any

_STATUS = {
    400: "the Hub does not accept the request",
    401: "the Hub asks for a login: `hf auth login`, or set HF_TOKEN",
    403: "no permission: ask for access on the repository's page, or use a token that may write",
    404: "no such repository or revision",
    409: "it exists already",
    412: "the repository was changed in between: look at the change and try again",
    429: "too many requests: try again later",
}
_CLASSES = (
    ({"EntryNotFoundError"}, "a file that the repository lists is missing"),
    ({"ConnectError", "ConnectTimeout", "ConnectionError", "ConnectionRefusedError"}, "no connection"),
    ({"TimeoutException", "TimeoutError"}, "the Hub did not answer in time"),
    ({"RemoteProtocolError", "ReadError", "IncompleteReadError"}, "the connection broke off"),
)


def reason(error: BaseException) -> str:
    """One line for what the client raised; its own messages run over many. Causes are looked through."""
    seen: Any = error
    while seen is not None:
        told = re.search(r"HTTP status \w+ error \((\d{3})", str(seen))  # the xet library has them in its text
        kinds = set() if told else {kind.__name__ for kind in type(seen).__mro__}
        for known, text in _CLASSES:
            if kinds & known:
                return text
        status = getattr(getattr(seen, "response", None), "status_code", int(told[1]) if told else None)
        if status in _STATUS:
            return _STATUS[status]
        if status is not None and status >= 500:
            return f"the Hub is out of order (status {status}): try again later"
        seen = seen.__cause__ or seen.__context__
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{type(error).__name__}: {first}"
