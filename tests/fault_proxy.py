"""An HTTP proxy on loopback, in front of an S3 server, that misbehaves as it is told.

::

    with FaultProxy(s3_server.endpoint) as proxy:      # proxy.endpoint goes to AWS_ENDPOINT_URL
        proxy.faults = [Fault("error", method="PUT", key="part-7", times=2)]
        ...
        proxy.count("PUT")                             # requests that arrived, faulty ones too

What has no fault is passed on as it is: the Host header too, which SigV4 signs.
"""

import http.client
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

Kind = Literal[
    "error",  # `status` with an S3 error of `code`; the store sees nothing
    "delay",  # `seconds` before the request is passed on
    "drop_request",  # half of the request's body is passed on, then both connections end
    "cut_request",  # half of the request's body is passed on, with a length that matches
    "lost_response",  # the store has done it; the connection ends without an answer
    "drop_response",  # half of the answer's body, then the connection ends
    "cut_response",  # half of the answer's body, with a length that matches (HEAD: half the length)
    "long_length",  # the whole body, under a length of one byte more, then the end
]


@dataclass
class Fault:
    """What happens to the requests that it fits."""

    kind: Kind
    method: str = ""
    """Any, if empty."""
    key: str = ""
    """Part of the path with its query, unquoted."""
    times: float = float("inf")
    """How many requests it still happens to."""
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0

    def takes(self, method: str, target: str) -> bool:
        """Whether it happens to this request, which then counts."""
        if self.times < 1 or self.method not in ("", method) or self.key not in unquote(target):
            return False
        self.times -= 1
        return True


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on, but for those that the first fitting fault happens to."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.delay_s = 0.0
        """Before every request, as a store that is far away."""
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """Method and unquoted target of every request that arrived."""
        self.bytes_sent = 0
        """Of the bodies of all answers."""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def count(self, method: str = "", key: str = "") -> int:
        """Requests that arrived, of one method (or any) with `key` in their target."""
        return sum(method in ("", m) and key in target for m, target in self.requests)

    def arrived(self, method: str, target: str) -> Fault | None:
        """Note a request; the fault that happens to it."""
        with self._lock:
            self.requests.append((method, unquote(target)))
            return next((fault for fault in self.faults if fault.takes(method, target)), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what the tests are about: nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"  # keeps connections, and answers `Expect: 100-continue`
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        fault = self.server.arrived(self.command, self.path)
        kind = fault.kind if fault else None
        time.sleep(self.server.delay_s + (fault.seconds if fault else 0))
        assert "Transfer-Encoding" not in self.headers, "the proxy takes bodies of known length"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault and kind == "error":
            text = f"<Error><Code>{fault.code}</Code><Message>Made by a test.</Message></Error>"
            return self._answer(fault.status, [("Content-Type", "application/xml")], text.encode())
        if kind == "cut_request":
            body = body[: len(body) // 2]
            self.headers.replace_header("Content-Length", str(len(body)))
        server = http.client.HTTPConnection(str(self.server.upstream.netloc), timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    server.putheader(name, value)
            server.endheaders()
            if kind == "drop_request":
                server.send(body[: len(body) // 2])
                return self._hang_up()
            if body:
                server.send(body)
            answer = server.getresponse()
            data = answer.read()
        finally:
            server.close()
        if kind == "lost_response":
            return self._hang_up()
        headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in _OWN]
        sent = data[: len(data) // 2] if kind in ("drop_response", "cut_response") else data
        length = {"drop_response": len(data), "long_length": len(data) + 1}.get(kind or "")
        if self.command == "HEAD":
            length = int(answer.getheader("Content-Length") or 0)
            length = {"cut_response": length // 2, "long_length": length + 1}.get(
                kind or "", length
            )
        self._answer(answer.status, headers, sent, length)
        if kind in ("drop_response", "long_length"):
            self._hang_up()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.bytes_sent += len(body)
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


_OWN = {"content-length", "transfer-encoding", "connection"}  # of one hop, not of the object
