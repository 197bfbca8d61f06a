"""A receiver of webhooks that runs in a thread of this process, for tests and demonstrations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, slots=True)
class Request:
    """One POST as it came in. `headers` has lower-case names; `connection` tells connections apart."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer. A body in pieces is sent piece by piece, as they come."""

    status: int = 204
    body: bytes | Iterable[bytes] = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Answer = Callable[[Request], Reply]


class Receiver:
    """The running server: its `url`, and every request it has seen, in order of arrival."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.url = ""
        self.requests: list[Request] = []

    def receive(self, request: Request) -> Reply:
        self.requests.append(request)
        return self.answer(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client that keeps its connection open must not keep the process alive
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up early is its own business, and no traceback of ours."""


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else head and body of an answer wait 40 ms for each other

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            peer = (str(self.client_address[0]), int(self.client_address[1]))
            reply = receiver.receive(Request(self.path, headers, body, peer))
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if isinstance(reply.body, bytes):
                if reply.status not in (204, 304):
                    self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
            else:
                self.close_connection = True  # a body of unknown length ends with the connection
                self.end_headers()
                for piece in reply.body:
                    self.wfile.write(piece)

        def log_message(self, format: str, *args: object) -> None:  # the base class's name
            pass

    return Handler


@contextmanager
def open_receiver(
    answer: Answer = lambda request: Reply(), *, host: str = "127.0.0.1", port: int = 0
) -> Iterator[Receiver]:
    """Serve while the block lasts. `answer` runs in the thread of the connection, several at once."""
    receiver = Receiver(answer)
    with _Server((host, port), _handler(receiver)) as server:
        receiver.url = f"http://{host}:{server.server_port}"
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="receiver"
        )
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
