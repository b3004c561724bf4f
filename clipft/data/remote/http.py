"""One request over http or https, for a file from some byte on: what comes back, or what is wrong with it."""

import http.client
import netrc
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import suppress
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from clipft.data.remote.addresses import is_public, refused_redirect, scheme_of
from clipft.data.remote.body import Body, Fault

MOST_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429, 500, 502, 503, 504)  # what a server says of itself, not of the file
ABSENT = (404, 410)
LOGIN = "Give this machine access (~/.netrc for https), or use an address that is open to it."


def open_http(address: str, start: int, timeout_s: float) -> Body:
    """The answer for the file's bytes from `start` on, or for all of them where the server does not give parts."""
    url, own = address, set[str]()
    for _ in range(MOST_REDIRECTS + 1):
        headers = {"User-Agent": "clipft", "Accept-Encoding": "identity", **authorization(url)}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        try:
            response = opener(url, own if url != address else None).open(
                urllib.request.Request(url, headers=headers), timeout=timeout_s
            )
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in REDIRECTS or "Location" not in error.headers:
                raise refusal(error.code, error.reason, error.headers) from error
            own = own or addresses_of(url)
            after = urljoin(url, error.headers["Location"])
            if why := refused_redirect(url, after, own, addresses_of(after)):
                raise Fault(f"{why}, which is not followed", final=True) from error
            url = after
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise unanswered(error) from error
        else:
            return body_of(response)
    raise Fault(f"more than {MOST_REDIRECTS} redirects", final=True)


def opener(url: str, own: set[str] | None) -> urllib.request.OpenerDirector:
    """Follows no redirect by itself; with `own`, also refuses a private address that is none of these.

    Looked at again when the connection stands: between two answers a name can get another address.
    """
    host = urlsplit(url).hostname

    def checked(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        class Checked(kind):
            def connect(self) -> None:
                super().connect()
                peer = self.sock.getpeername()[0]
                # Of a proxy the address is the user's own choice.
                if own is not None and self.host == host and peer not in own and not is_public(peer):
                    raise Fault(f"a redirect to the private address {peer}, which is not followed", final=True)

        return Checked

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(checked(http.client.HTTPConnection), req)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(checked(http.client.HTTPSConnection), req)

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
            return None

    return urllib.request.build_opener(Plain, Secure, Stay)


def addresses_of(url: str) -> set[str]:
    """The IP addresses of the address's host; none where its name is only known to a proxy."""
    with suppress(OSError, UnicodeError):
        return {str(found[4][0]) for found in socket.getaddrinfo(urlsplit(url).hostname, None)}
    return set()


def authorization(url: str) -> dict[str, str]:
    """What ~/.netrc (or the file that NETRC names) has for this host; never over plain http."""
    host = urlsplit(url).hostname
    if scheme_of(url) != "https" or host is None:
        return {}
    with suppress(OSError, netrc.NetrcParseError):
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        if found:
            return {"Authorization": "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()}
    return {}


def body_of(response: http.client.HTTPResponse) -> Body:
    """The body with what the headers say of it."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise Fault(f"the server sends it compressed ({headers['Content-Encoding']}), unasked", final=True)
    start, total = 0, response.length  # None where chunks, or the end of the connection, end it
    if response.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if match is None:
            response.close()
            raise Fault("the server sends a part without saying which (Content-Range)", restart=True)
        start, total = int(match[1]), None if match[2] == "*" else int(match[2])
    elif response.status != 200:
        response.close()
        raise Fault(f"HTTP {response.status} {response.reason}")

    def read(most: int) -> bytes:
        try:
            return response.read1(most)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Fault(said_of(error)) from error

    stamp = headers.get("ETag") or headers.get("Last-Modified")
    return Body(read, response.close, start, total, stamp)


def refusal(code: int, reason: str, headers: Message) -> Fault:
    """What an answer of 4xx or 5xx means for the next attempt."""
    said = f"HTTP {code} {reason}"
    if code == 416:
        match = re.match(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
        return Fault(f"{said}: the file is shorter now", restart=True, total=int(match[1]) if match else None)
    if code in PASSING:
        return Fault(said, wait_s=wanted_wait_s(headers.get("Retry-After")))
    advice = LOGIN if code in (401, 403, 407) else "Check the address, and that the file is there."
    return Fault(said, final=True, absent=code in (*ABSENT, 403), advice=advice)


def wanted_wait_s(value: str | None) -> float | None:
    """Seconds that Retry-After asks for, by a number or a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def unanswered(error: Exception) -> Fault:
    """A connection that did not come about."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
        return Fault("its host is not known", final=True, advice="Check the address, and this machine's network.")
    if isinstance(cause, ssl.SSLCertVerificationError):
        advice = "Use the name that the certificate is for, or add its authority to this machine's (SSL_CERT_FILE)."
        return Fault(f"its certificate is not trusted ({cause.verify_message})", final=True, advice=advice)
    return Fault(said_of(error))


def said_of(error: Exception) -> str:
    """An error of the connection in a few words, and nothing of its address."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, http.client.IncompleteRead):
        return "the connection ended in the middle of the body"
    return cause.strerror or str(cause) if isinstance(cause, OSError) else type(cause).__name__
