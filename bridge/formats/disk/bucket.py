"""Waiting for a bucket: no longer than was said, where an interrupt can end it, and with the cause if it is in vain.

TensorStore retries a request for a quarter of an hour before it says why it fails, so the cause is asked for
with one request of its own. Its messages carry curl's codes and HTTP's (tensorstore, internal/http).
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bridge.errors import Problem, SourceRefused

#: seconds to wait for an answer
TIMEOUT = 30.0
#: bytes of an answer for which one second more is waited
PER_SECOND = 1 << 20
#: seconds between looks at what may end the wait
SLICE = 0.1
#: seconds after which a wait is told
TOLD_AFTER = 2.0
#: seconds to wait for the cause
PROBE = 5.0
#: a key that no error message depends on
PROBED = "_METADATA"

_CURL = re.compile(r"curl_code='(\d+)'")
_HTTP = re.compile(r"http_response_code='(\d+)'")
_SAID = re.compile(r"CURL error (.*?) \[")

#: curl's codes (curl, libcurl-errors)
_UNRESOLVED, _REFUSED = ("5", "6"), ("7",)

#: where requests of a scheme go instead of to its own servers
ENDPOINTS = {"gs": "TENSORSTORE_GCS_HTTP_URL", "s3": "AWS_ENDPOINT_URL"}
_LOGINS = {
    "gs": "log in with an account that may read it: gcloud auth application-default login",
    "s3": "give the credentials of an account that may read it: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE",
}

Tell = Callable[[str], None]
"""Called with a line about a wait, again and again, and with an empty one at its end."""

_tell: list[Tell] = []
_thread = threading.local()


def tell_waits(tell: Tell) -> None:
    """From now on, tell of waits that take long."""
    _tell[:] = [tell]


def give_up_with(stop: threading.Event) -> None:
    """From now on, waits of this thread end once an event is set."""
    _thread.stop = stop


def endpoint(scheme: str) -> dict[str, str]:
    """What TensorStore must be told of where requests go. It reads the variable of ``gs`` itself."""
    url = os.environ.get(ENDPOINTS["s3"]) if scheme == "s3" else None
    if not url:
        return {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"endpoint": url, "aws_region": region}


def result(future: Any, url: str, spec: Mapping[str, Any], timeout: float) -> Any:
    """The result of a TensorStore future of a bucket.

    Args:
        future: what is waited for.
        url: whose it is.
        spec: TensorStore's specification of the directory.
        timeout: seconds.

    Raises:
        SourceRefused: the bucket cannot be read, or does not answer in time.
        ValueError: it can be read, and what it contains is wrong.
    """
    try:
        with _told(url, timeout) as tell:
            return _sliced(future, timeout, tell)
    except TimeoutError:
        stopped = _stopped()
    except ValueError as error:
        said = str(error)
        problem = _problem(said, url)
        if problem is None and not said.startswith("OUT_OF_RANGE"):
            # of a listing that fails, TensorStore may say no more than that it cannot be parsed
            problem = _cause(url, spec, timeout)
        if problem is None:
            raise
        raise SourceRefused(problem) from error
    raise SourceRefused((None if stopped else _cause(url, spec, timeout)) or _stalled(url, timeout))


def _sliced(future: Any, timeout: float, tell: Callable[[float], None] = lambda waited: None) -> Any:
    """The result of a future, waited for in pieces. Raises TimeoutError: it is late, or nobody wants it any more."""
    began = time.monotonic()
    try:
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(timeout=min(SLICE, timeout))
            waited = time.monotonic() - began
            if waited >= timeout or _stopped():
                raise TimeoutError
            tell(waited)
    finally:
        if not future.done():
            future.cancel()


def _stopped() -> bool:
    stop = getattr(_thread, "stop", None)
    return stop is not None and stop.is_set()


@contextlib.contextmanager
def _told(url: str, timeout: float) -> Iterator[Callable[[float], None]]:
    told = False

    def tell(waited: float) -> None:
        nonlocal told
        if _tell and waited >= TOLD_AFTER:
            told = True
            _tell[0](f"waiting for {url}: {waited:.0f} s of {timeout:.0f} s")

    try:
        yield tell
    finally:
        if told:
            _tell[0]("")


def _cause(url: str, spec: Mapping[str, Any], timeout: float) -> Problem | None:
    """Why requests fail, by one that is not tried again; None where it does not."""
    import tensorstore as ts

    once = ts.Context({"gcs_request_retries": {"max_retries": 0}, "s3_request_retries": {"max_retries": 0}})
    try:
        store = _sliced(ts.KvStore.open(dict(spec), context=once), min(timeout, PROBE))
        _sliced(store.read(PROBED), min(timeout, PROBE))
    except ValueError as error:
        return _problem(str(error), url)
    except TimeoutError:
        return None
    return None


def _problem(said: str, url: str) -> Problem | None:
    """What TensorStore's message says of the way to a bucket; None where it is about something else."""
    scheme = url.partition("://")[0]
    if curl := _CURL.search(said):
        text = match[1] if (match := _SAID.search(said)) else said
        if curl[1] in _UNRESOLVED:
            return Problem(
                f"{url}: the name of its server cannot be resolved ({text})",
                "check the connection to the network, and its proxy (https_proxy), if it has one",
            )
        where = f"check the network, and {ENDPOINTS.get(scheme, 'the address')} where it is set"
        if curl[1] in _REFUSED:
            return Problem(f"{url}: its server refuses the connection ({text})", where)
        return Problem(f"{url}: its server cannot be reached ({text})", where)
    http = _HTTP.search(said)
    if http is None:
        return None
    if http[1] in ("401", "403"):
        return Problem(
            f"{url}: reading it is not permitted (HTTP {http[1]})",
            _LOGINS.get(scheme, "check the permissions"),
        )
    if http[1] == "404":
        return Problem(
            f"{url}: there is no such bucket or object", "check the spelling of the bucket and the path"
        )
    if http[1] == "429" or http[1].startswith("5"):
        return Problem(
            f"{url}: its server fails (HTTP {http[1]})",
            "try again later, or wait longer with --timeout SECONDS",
        )
    return None


def _stalled(url: str, timeout: float) -> Problem:
    return Problem(
        f"{url}: no answer within {timeout:.3g} s", "check the network, or wait longer with --timeout SECONDS"
    )
