"""A small HTTP server, bounded in connections, bytes and seconds: what is under the reward server and the label page.

A request must arrive, and its answer must leave, within a total time. When all connections are taken, the next one
takes the place of the oldest that has not sent its request yet, so that slow clients hold nobody up; where all are at
work, it is told 503 and when to come back. The loop that accepts connections never waits for a client.
"""

import hmac
import io
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

Answer = tuple[bytes, str, Mapping[str, str]]  # body, content type, further headers
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
GRACE = 0.25  # seconds for a request to arrive before its place may be taken
WAIT = 0.5  # seconds for a place to be found
DRAIN_SECONDS, DRAIN_BYTES = 1.0, 2**26  # that a client may still send after its answer


class Refused(Exception):
    """A request that is answered with a status other than 200, and one sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Server(socketserver.ThreadingTCPServer):
    """One request for each connection, each in its own thread, at most `connections` at a time.

    seconds: in which a request must arrive, and in which its answer must leave. Raises OSError if it cannot listen.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, place: tuple[str, int], handler: type["Handler"], connections: int = 64, seconds: float = 30.0):
        self.connections, self.seconds = connections, seconds
        self.open: dict[socket.socket, float | None] = {}  # since when a request is awaited; None if it is there
        self.lock = threading.Lock()  # of `open`
        self.leaving = threading.BoundedSemaphore(64 + connections)
        self.address_family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        super().__init__(place, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection, or for its wait; wait for nothing here."""
        if self._taken(request):
            super().process_request(request, client_address)
        elif self.leaving.acquire(blocking=False):
            threading.Thread(target=self._wait, args=[request, client_address], daemon=True).start()
        else:
            request.close()

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.open.pop(request, None)
        super().shutdown_request(request)

    def arrived(self, request: socket.socket, whole: bool = True) -> None:
        """Say that a connection's request is there, or, if that is done, that its place may be taken."""
        with self.lock:
            if request in self.open:
                self.open[request] = None if whole else 0.0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""

    def _taken(self, request: socket.socket) -> bool:
        """Whether there is a place for the connection, perhaps that of one that has sent no whole request yet."""
        now = time.monotonic()
        with self.lock:
            if len(self.open) >= self.connections:
                waits = {other: since for other, since in self.open.items() if since is not None}
                slowest = min(waits, key=lambda other: waits[other], default=None)
                if slowest is None or now - waits[slowest] < GRACE:
                    return False
                del self.open[slowest]
                with suppress(OSError):
                    slowest.send(BUSY, socket.MSG_DONTWAIT)
                with suppress(OSError):
                    slowest.shutdown(socket.SHUT_RDWR)  # which wakes its thread
            self.open[request] = now
        return True

    def _wait(self, request: socket.socket, client_address: Any) -> None:
        """Answer a connection that has found a place meanwhile, or turn it away."""
        try:
            end = time.monotonic() + WAIT
            while not (found := self._taken(request)) and time.monotonic() < end:
                time.sleep(0.02)
            if not found:
                self._turn_away(request)
        finally:
            self.leaving.release()
        if found:
            self.process_request_thread(request, client_address)

    def _turn_away(self, request: socket.socket) -> None:
        with suppress(OSError):
            request.settimeout(DRAIN_SECONDS)
            request.sendall(BUSY)
            drain(request)
        request.close()


class Deadline(io.RawIOBase):
    """What a socket gives until the moment `end`; TimeoutError after it, however the bytes come."""

    def __init__(self, connection: socket.socket, end: float):
        self.connection, self.end = connection, end
        self.source = connection.makefile("rb", buffering=0)  # which keeps the socket open until `close`

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.connection.settimeout(left(self.end))
        return self.source.readinto(buffer)

    def close(self) -> None:
        self.source.close()
        super().close()


def left(end: float) -> float:
    """Seconds until the moment `end`; TimeoutError if it has passed."""
    if (seconds := end - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    return seconds


def drain(connection: socket.socket) -> None:
    """Read what a client still sends, for a while, so that it gets to read our answer and not a reset."""
    connection.shutdown(socket.SHUT_WR)
    rest, most = Deadline(connection, time.monotonic() + DRAIN_SECONDS), DRAIN_BYTES
    buffer = bytearray(2**16)
    while most > 0 and (found := rest.readinto(buffer)):
        most -= found


class Handler(BaseHTTPRequestHandler):
    """One connection, one request. A subclass gives `get` and `post`, which return an answer or raise Refused."""

    server: Server
    server_version, sys_version = "difftune", ""
    headers_of_all: Mapping[str, str] = {}

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Deadline(self.connection, time.monotonic() + self.server.seconds))  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.arrived(self.connection)
        self._answer(self.get)

    def do_POST(self) -> None:
        self._answer(self.post)

    def get(self) -> Answer:
        raise Refused(404, "nothing is here")

    def post(self) -> Answer:
        raise Refused(404, "nothing is here")

    def failed(self, error: Exception) -> Refused:
        """What is said of an exception that is no Refused; raises it if it is a client that has gone."""
        raise error

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: no token and no prompt is written down."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser of requests refuses, in our words."""
        self._send(int(code), as_json({"error": message or "this is not a request"}))

    def _answer(self, answer: Callable[[], Answer]) -> None:
        try:
            self._send(200, answer())
        except Refused as refused:
            self._send(refused.status, as_json({"error": str(refused)}))
        except Exception as error:
            said = self.failed(error)
            self._send(said.status, as_json({"error": str(said)}))

    def _send(self, status: int, answer: Answer) -> None:
        body, kind, headers = answer
        self.connection.settimeout(self.server.seconds)  # of all that is sent
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(body)), **self.headers_of_all, **headers}
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
        self.server.arrived(self.connection, whole=False)
        with suppress(OSError):
            drain(self.connection)

    # -------------------------------------------------------------------------------------------- checks

    def known(self, given: str, token: str) -> bool:
        """Whether the client knows the token, in a time that does not tell how much of it."""
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())

    def from_here(self) -> None:
        """Refuses a request for another host: a page elsewhere whose name was pointed at this machine sends such."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:  # "[::1"
            host = ""
        if not loopback(host):
            raise Refused(403, "this server is for this machine: ask it at 127.0.0.1")

    def same_origin(self) -> None:
        """Refuses what another site's page sends."""
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers.get('Host', '')}":
            raise Refused(403, "another site may not ask here")

    def body(self, most: int) -> bytes:
        """The body of a request of JSON, whole."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a request is application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(411, "a request says its Content-Length")
        if len(length) > 12 or int(length) > most:
            raise Refused(413, f"{length[:20]} bytes in one request: {most} is the limit")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client has gone")
        self.server.arrived(self.connection)
        return body


def object_of(body: bytes) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(found, dict):
        raise Refused(400, "the body is a JSON object")
    return found


def as_json(said: Mapping[str, Any]) -> Answer:
    return json.dumps(said).encode(), "application/json", {}


def loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
