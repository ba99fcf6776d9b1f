"""The page and its networks on this machine: an HTTP server that answers a fixed table of requests.

It reads no file by the path of a request, and takes requests of its own page alone: `Host` must be its own name, else a
foreign page whose name is made to mean this machine could ask (DNS rebinding), and `Origin` must be the page's.
"""

import contextlib
import errno
import io
import ipaddress
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from capszoo.errors import UsageError, first_line

from .looking import Network
from .page_files import CONTENT_TYPES, POLICY, page_files
from .requests import RequestError, answer_draw, answer_look, longest_body, read_json

__all__ = ["ExplorerServer"]

# Seconds that a request, and its answer, may take to come through.
PATIENCE = 10.0
# Requests at a time; a page has one or two.
MOST_CONNECTIONS = 64
_JSON = "application/json"
_HEADERS = {
    "Content-Security-Policy": POLICY.format(scripts="") + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ANSWERS = {"/api/look": answer_look, "/api/draw": answer_draw}


class _Deadline(io.RawIOBase):
    """Reads a socket until a moment: a limit for each read alone would let a request last for ever, byte by byte."""

    def __init__(self, connection: socket.socket):
        self.connection, self.end = connection, time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection (HTTP/1.0: no request can hide behind another)."""

    server: "ExplorerServer"
    server_version, sys_version = "capszoo", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Deadline(self.connection))

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, find: Callable[[], tuple[str, bytes]]) -> None:
        try:
            self._check_source()
            kind, data = find()
            status = 200
        except RequestError as error:
            status, kind, data = error.status, _JSON, _error(first_line(error))
        except TimeoutError:
            status, kind, data = 408, _JSON, _error("the request took too long")
        except OSError:
            raise
        except Exception as error:  # of the network: one request fails, the server goes on
            status, kind, data = 500, _JSON, _error(f"the network failed: {type(error).__name__}")
        self._send(status, kind, data)

    def _check_source(self) -> None:
        if self.request_version == "HTTP/0.9":
            raise RequestError("HTTP/0.9 is not served")
        hosts, origins = self.headers.get_all("Host") or [], self.headers.get_all("Origin") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise RequestError(
                "the Host of this request is not this server: open the page by the address it prints", 403
            )
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            raise RequestError("the Origin of this request is not this page", 403)
        if self.path in _ANSWERS and self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise RequestError("this request comes from another site", 403)

    def _get(self) -> tuple[str, bytes]:
        if self.path in _ANSWERS:
            raise RequestError(f"{self.path} takes POST", 405)
        if self.path not in self.server.pages:
            raise RequestError("there is nothing at this path", 404)
        return self.server.pages[self.path]

    def _post(self) -> tuple[str, bytes]:
        if self.path not in _ANSWERS:
            raise RequestError("nothing at this path takes POST", 405 if self.path in self.server.pages else 404)
        if self.headers.get_content_type() != _JSON or not self.headers.get("Content-Type"):
            raise RequestError(f"the Content-Type must be {_JSON}", 415)
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) != 1:
            raise RequestError("one Content-Length is needed, and no Transfer-Encoding", 411)
        if not re.fullmatch(r"[0-9]{1,12}", lengths[0]):
            raise RequestError("the Content-Length is not a number of bytes")
        length = int(lengths[0])
        if length > self.server.longest_body:
            raise RequestError(f"the body is longer than {self.server.longest_body} bytes", 413)
        body = self.rfile.read(length)
        if len(body) < length:
            raise RequestError("the body is shorter than its Content-Length")
        values = read_json(body)
        with self.server.lock:
            answer = _ANSWERS[self.path](self.server.networks, values)
        return _JSON, json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.connection.settimeout(PATIENCE)
        self.request_version = "HTTP/1.0"  # answers to one of 0.9 would have no head
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status == 405:
            self.send_header("Allow", "POST" if self.path in _ANSWERS else "GET, HEAD")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: lines that are too long, methods and versions that it does not know."""
        self.path = getattr(self, "path", "")
        code = {501: 405, 505: 400}.get(int(code), int(code))
        text = "this method is not known here" if code == 405 else "this is not a request of HTTP that is understood"
        self.close_connection = True
        self._send(code, _JSON, _error(text))

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each request would hide what the command prints."""


def _error(message: str) -> bytes:
    return json.dumps({"error": message}).encode() + b"\n"


class ExplorerServer(ThreadingHTTPServer):
    """Serves the page, and answers for networks one request at a time.

    Args:
        networks: The networks to explore.
        host: Name or address to listen on.
        port: Port to listen on, 0 for any that is free.
        open_to_network: Allow a host that other machines reach, too.

    Raises:
        UsageError: If the host is not this machine's alone, or the port is taken.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, networks: Sequence[Network], host: str = "127.0.0.1", port: int = 0, open_to_network: bool = False
    ):
        self.networks, self.open_to_network = list(networks), open_to_network
        self.lock, self.longest_body = threading.Lock(), longest_body(networks)
        self.slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        files = page_files("http")
        files["models.json"] = json.dumps([network.describe() for network in networks]).encode()
        self.pages = {f"/{name}": (CONTENT_TYPES.get(Path(name).suffix, _JSON), data) for name, data in files.items()}
        self.pages["/"] = self.pages["/index.html"]
        if not open_to_network and not _is_loopback(host):
            raise UsageError(
                f"--host {host} is reached from other machines, which could use the networks: give 127.0.0.1, or add "
                "--open-to-network"
            )
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            is_host = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
            other = "--host" if is_host else "--port"
            raise UsageError(f"--host {host} --port {port} cannot be served ({reason}): give another {other}") from None
        self.names = {host, "localhost", "127.0.0.1", "::1"}

    @property
    def url(self) -> str:
        """Where the page is."""
        host = self.server_name
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def knows(self, host: str) -> bool:
        """Whether a header `Host` names this server. Open to a network, by any address, but by no foreign name."""
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+))(?::([0-9]{1,5}))?", host)
        if match is None or int(match[3] or 80) != self.server_port:
            return False
        name = (match[1] or match[2]).lower()
        if name in self.names:
            return True
        return self.open_to_network and (_is_address(name) or name == socket.gethostname().lower())

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # that of HTTPServer asks the network for a name
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            request.close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection so that the answer arrives: what was not read of the request would reset it."""
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(0.5)
            end = time.monotonic() + 1
            while time.monotonic() < end and request.recv(1 << 16):
                pass
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break off; nothing else comes here."""


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
