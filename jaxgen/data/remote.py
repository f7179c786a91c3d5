"""Parts of files on a disk, behind HTTP or in an object store, and patience for what passes.

Many threads may read at once; over HTTP each keeps its connection."""

import functools
import http.client
import os
import random
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

from jaxgen.errors import UserError
from jaxgen.storage import DRIVERS, as_path, first_line

TRIES = 6
WAIT = 0.25  # seconds before the second try; twice as long before each further one, half as much more or less at random
TIMEOUT = 30.0  # seconds without a byte
REDIRECTS = 5
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that another try may mend

T = TypeVar("T")


class Lost(Exception):
    """A file, or a part of it, that cannot be read: why, in a few words."""


def is_remote(url: str) -> bool:
    return "://" in url


def size(url: str) -> int:
    """Bytes of a file. Raises Lost where it is missing, empty or out of reach."""
    if url.startswith(("http://", "https://")):
        found = patiently(lambda: _http(url, 0, 1)[1])
    elif is_remote(url):
        found = patiently(lambda: _store(url).size(url))
    else:
        found = patiently(lambda: os.path.getsize(url))
    if not found:
        raise Lost("empty")
    return found


def directory(url: str) -> list[str]:
    """What lies in a directory. Raises UserError where there is none."""
    try:
        if is_remote(url):
            return [_store(url).unstrip_protocol(name) for name in _store(url).ls(url, detail=False)]
        return [os.path.join(url, name) for name in os.listdir(url)]
    except OSError as error:
        raise UserError(f"{url}: no such directory, or it cannot be read ({type(error).__name__})") from None


def read(url: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on. Raises Lost where there are none, or where TRIES tries were of no avail."""
    if url.startswith(("http://", "https://")):
        return patiently(lambda: _whole(_http(url, offset, length)[0], length))
    if is_remote(url):
        return patiently(lambda: _whole(_store(url).cat_file(url, start=offset, end=offset + length), length))
    return patiently(lambda: _whole(_local(url, offset, length), length))


def patiently(attempt: Callable[[], T]) -> T:
    """What `attempt` returns, at the latest at the last of TRIES tries."""
    for tried in range(TRIES):
        try:
            return attempt()
        except (Lost, UserError):
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise Lost("no such file") from None
        except PermissionError:
            raise Lost("no permission to read it") from None
        except Exception as error:  # object stores and HTTP have a hundred names for what passes
            if tried == TRIES - 1:
                raise Lost(f"{first_line(error)[:200]} (tried {TRIES} times)") from error
        time.sleep(WAIT * 2**tried * random.uniform(0.5, 1.5))
    raise AssertionError


def _whole(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise OSError(f"{len(data)} bytes came, {length} were asked for")
    return data


def _local(path: str, offset: int, length: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def _http(url: str, offset: int, length: int) -> tuple[bytes, int]:
    """(the part, bytes of the whole file). Not HEAD for the size: signed addresses and some servers refuse it, and this also
    says whether parts are served."""
    for _ in range(REDIRECTS):
        scheme, host, target = _address(url)
        answer, data = _get(scheme, host, target, offset, length)
        if answer.status == 206:
            return data, int(answer.headers["Content-Range"].rpartition("/")[2])
        if answer.status not in (301, 302, 303, 307, 308):
            break
        url = urllib.parse.urljoin(url, answer.headers["Location"])
    if answer.status in PASSING:
        raise OSError(f"HTTP status {answer.status}")
    why = {
        200: "its server does not serve parts of files (HTTP ranges)",
        416: "shorter than it was, or empty (HTTP status 416)",
    }
    raise Lost(why.get(answer.status, f"HTTP status {answer.status}"))


def _get(scheme: str, host: str, target: str, offset: int, length: int) -> tuple[http.client.HTTPResponse, bytes]:
    """An answer and, where it is one, the part; the thread keeps the connection for the next."""
    kept = _here.__dict__.setdefault("connections", {})
    connection = kept.pop((scheme, host), None)
    for old in (True, False) if connection is not None else (False,):
        connection = connection if old else _connection(scheme, host)
        try:
            asked = {"Range": f"bytes={offset}-{offset + length - 1}", "User-Agent": "jaxgen"}
            connection.request("GET", target, headers=asked)
            answer = connection.getresponse()
            break
        except (http.client.RemoteDisconnected, ConnectionError):
            connection.close()
            if not old:  # else it had been idle for too long
                raise
    data = answer.read() if answer.status == 206 else b""
    if answer.status == 206 and not answer.will_close:
        kept[scheme, host] = connection
    else:  # what else came is left unread, and the connection with it
        connection.close()
    return answer, data


def _connection(scheme: str, host: str) -> http.client.HTTPConnection:
    # http.client rather than urllib3: it takes half as long over an answer's head, and a small picture costs little more.
    if scheme == "https":
        return http.client.HTTPSConnection(host, timeout=TIMEOUT, context=_tls())
    return http.client.HTTPConnection(host, timeout=TIMEOUT)


_here = threading.local()


@functools.lru_cache(2**16)
def _address(url: str) -> tuple[str, str, str]:
    """(scheme, host and port, path and query as they are sent)."""
    parts = urllib.parse.urlsplit(url)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return parts.scheme, parts.netloc, urllib.parse.quote(target, safe="%/:?#[]@!$&'()*+,;=~")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@functools.cache
def _filesystem(protocol: str) -> Any:
    import fsspec

    return fsspec.filesystem(protocol)


def _store(url: str) -> Any:
    if url.startswith(tuple(DRIVERS)):
        as_path(url)  # names the extra that brings the driver
    return _filesystem(url.partition("://")[0])
