"""Downloads images from URLs, if the network is allowed, within limits of size and time.

Only a URL that the user names is fetched: data sets and lists of jobs name files.
"""

import ipaddress
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException

from ipadapter_jax.errors import InputError

MAX_BYTES = 100_000_000
_TIMEOUT, _DEADLINE = 20, 120  # seconds without an answer, and in total
_CHUNK = 1 << 16
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the first one that is set applies
_ON = ("1", "ON", "YES", "TRUE")
_REMEDY = "download it first, then give the path of the file"


def is_url(path: str) -> bool:
    """Whether this is http:// or https://; other schemes are not fetched."""
    return path.lower().startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """The content of an https URL; http only from this machine.

    Raises InputError naming the URL: the network is off (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE), not https, not found,
    too large or too slow.
    """
    name = repr(url)[:500]
    # As huggingface_hub reads them, but at every call: it reads them once, at import.
    offline = next((variable for variable in _OFFLINE if os.environ.get(variable)), None)
    if offline is not None and os.environ[offline].upper() in _ON:
        raise InputError(f"{name} is a URL, and the network is off ({offline}): {_REMEDY}")
    _check(url, name, local=True)
    try:
        return _read(url, name)
    except InputError:
        raise
    except urllib.error.HTTPError as error:
        raise InputError(f"{name} could not be fetched (HTTP {error.code} {error.reason}): check the URL") from None
    except (OSError, HTTPException, ValueError) as error:
        why = " ".join(str(getattr(error, "reason", error)).split())[:200] or type(error).__name__
        raise InputError(f"{name} could not be fetched ({why}): check the URL and the network, or {_REMEDY}") from None


def _read(url: str, name: str) -> bytes:
    until = time.monotonic() + _DEADLINE
    opener = urllib.request.build_opener(_Redirects(name, local=_is_local(url)))
    request = urllib.request.Request(url, headers={"User-Agent": "ipadapter-jax", "Accept": "image/*"})
    found = bytearray()
    with opener.open(request, timeout=_TIMEOUT) as answer:
        declared = int(answer.headers.get("Content-Length") or 0)
        while declared <= MAX_BYTES and len(found) <= MAX_BYTES:
            if time.monotonic() > until:
                raise InputError(f"{name} took more than {_DEADLINE} seconds: {_REMEDY}")
            chunk = answer.read1(_CHUNK)
            if not chunk:
                break
            found += chunk
    if max(declared, len(found)) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES // 1_000_000} MB: give a smaller image, or {_REMEDY}")
    if len(found) < declared:
        raise InputError(f"{name} ended after {len(found)} of {declared} bytes: try again, or {_REMEDY}")
    return bytes(found)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects by the same rules: another server may not redirect to this machine."""

    def __init__(self, name: str, *, local: bool):
        self._name, self._local = name, local

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check(newurl, self._name, local=self._local)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check(url: str, name: str, *, local: bool) -> None:
    """Raises InputError for a URL that may not be fetched. local: whether it may lead to this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{name} is not a URL that can be read: {_REMEDY}") from None
    if not host or parts.username is not None:
        raise InputError(f"{name} names no host, or a password: {_REMEDY}")
    if _is_local(url) and not local:
        raise InputError(f"{name} leads to this machine itself: {_REMEDY}")
    if parts.scheme.lower() not in (("http", "https") if _is_local(url) else ("https",)):
        raise InputError(f"{name} is a URL without encryption or leads to one: give https://, or {_REMEDY}")


def _is_local(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
