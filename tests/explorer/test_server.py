"""The server: what it serves, and that hostile requests get an error and leave it serving."""

import contextlib
import http.client
import json
import random
import socket
import threading
import time

import pytest

from capszoo.errors import UsageError
from capszoo.explorer import ExplorerServer, Network, server
from capszoo.opening import open_model

PIXELS = [0] * 784


@contextlib.contextmanager
def serving(networks, **kwargs):
    running = ExplorerServer(networks, **kwargs)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@pytest.fixture(scope="module")
def networks():
    return [Network(open_model("capsnet_tiny.mnist"))]


@pytest.fixture(scope="module")
def served(networks):
    with serving(networks) as running:
        yield running


def ask(served, method, path, body=None, **headers):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", served.server_port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and "Content-Type" not in named:
        named["Content-Type"] = "application/json"
    try:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def send(served, data, half_close=True):
    """All that comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", served.server_port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                found += part
        return found


def look(served, **values):
    return ask(served, "POST", "/api/look", json.dumps({"model": 0, "pixels": PIXELS, **values}))


def is_serving(served):
    return look(served)[0] == 200


def test_the_page_and_its_headers(served):
    status, headers, body = ask(served, "GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and b'src="http.js"' in body
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert policy.split("; frame-ancestors")[0].encode() in body  # the page says the same of itself
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    for name, kind in (("page.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        status, headers, body = ask(served, "GET", f"/{name}")
        assert status == 200 and headers["Content-Type"].startswith(kind) and body
    assert json.loads(ask(served, "GET", "/models.json")[2])[0]["name"] == "capsnet_tiny.mnist"
    status, headers, body = ask(served, "HEAD", "/page.js")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 1000
    for data in (b"<script>", b" style=", b" onclick", b"http://", b"https://"):
        assert data not in ask(served, "GET", "/")[2]


def test_answers(served, networks):
    status, headers, body = look(served)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert json.loads(body) == networks[0].look(PIXELS)
    values = {"model": 0, "target": 3, "capsules": [0.1] * 160}
    status, _, body = ask(served, "POST", "/api/draw", json.dumps(values))
    assert status == 200 and json.loads(body) == networks[0].draw([0.1] * 160, 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pixels": None}, "a list of 784"),
        ({"pixels": PIXELS[1:]}, "a list of 784"),
        ({"pixels": "0" * 784}, "a list of 784"),
        ({"pixels": [*PIXELS[1:], 256]}, "from 0 to 255"),
        ({"pixels": [*PIXELS[1:], -1]}, "from 0 to 255"),
        ({"pixels": [*PIXELS[1:], 0.5]}, "from 0 to 255"),
        ({"pixels": [*PIXELS[1:], True]}, "from 0 to 255"),
        ({"pixels": [*PIXELS[1:], [0]]}, "from 0 to 255"),
        ({"pixels": [*PIXELS[1:], 10**400]}, "from 0 to 255"),
        ({"model": 1}, "model must be"),
        ({"model": -1}, "model must be"),
        ({"model": "0"}, "model must be"),
        ({"model": False}, "model must be"),
        ({"target": 10}, "target must be"),
        ({"target": 1.0}, "target must be"),
        ({"path": "/etc/passwd"}, "unknown key 'path'"),
    ],
)
def test_wrong_values_to_look_at(served, values, expected):
    status, _, body = look(served, **values)
    assert status == 400 and body.count(b"\n") == 1 and expected in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"capsules": [0.0] * 159}, "a list of 160"),
        ({"capsules": [*[0.0] * 159, "1"]}, "from -1000 to 1000"),
        ({"capsules": [*[0.0] * 159, 1e9]}, "from -1000 to 1000"),
        ({"capsules": [*[0.0] * 159, 10**400]}, "from -1000 to 1000"),
        ({"capsules": [*[0.0] * 159, None]}, "from -1000 to 1000"),
        ({"target": None}, "target must be"),
    ],
)
def test_wrong_values_to_draw(served, values, expected):
    body = json.dumps({"model": 0, "target": 0, "capsules": [0.0] * 160, **values})
    status, _, found = ask(served, "POST", "/api/draw", body)
    assert status == 400 and expected in json.loads(found)["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"NaN",
        b'{"model": NaN}',
        b'{"model": 1e999}',
        b"[" * 3000,
        b"{}",
    ],
)
def test_bodies_that_are_no_requests(served, body):
    status, _, found = ask(served, "POST", "/api/look", body)
    assert status == 400 and json.loads(found)["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),  # its name was made to mean 127.0.0.1
        ({"Host": "evil.example:PORT"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "127.0.0.1.evil.example:PORT"}, 403),
        ({"Host": "localhost:PORT@evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:PORT"}, 200),
        ({"Host": "[::1]:PORT"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:PORT"}, 403),
        ({"Origin": "http://localhost:PORT"}, 403),  # another origin than the page that was asked for
        ({"Origin": "http://127.0.0.1:PORT"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Content-Type": "text/plain"}, 415),  # which a form of a foreign page could send
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_where_requests_come_from(served, headers, status):
    named = {name: value.replace("PORT", str(served.server_port)) for name, value in headers.items()}
    body = json.dumps({"model": 0, "pixels": PIXELS})
    found, _, answer = ask(served, "POST", "/api/look", body, **named)
    assert found == status and (status == 200 or json.loads(answer)["error"])
    if "Host" in headers:
        assert ask(served, "GET", "/", **named)[0] == status


@pytest.mark.parametrize(
    "path",
    ["/../pyproject.toml", "/..%2f..%2fetc/passwd", "/page.js/../page.js", "/%70age.js", "//page.js/", "/server.py",
     "/?x", "/page.js?x=1", "/page.js%00", "/api", "/favicon.ico", "/" + "a" * 5000, "*"],
)  # fmt: skip
def test_paths_that_are_not_in_the_table(served, path):
    status, _, body = ask(served, "GET", path)
    assert status == 404 and json.loads(body)["error"] == "there is nothing at this path"


def test_methods(served):
    for method, path, allowed in (
        ("GET", "/api/look", "POST"), ("POST", "/page.js", "GET, HEAD"), ("PUT", "/", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"), ("OPTIONS", "/api/look", "POST"), ("TRACE", "/", "GET, HEAD"),
        ("BREW", "/", "GET, HEAD"),
    ):  # fmt: skip
        status, headers, body = ask(served, method, path)
        assert (status, headers["Allow"]) == (405, allowed) and json.loads(body)["error"], method


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Content-Length: 99999999999"], 413),
        (["Content-Length: -5"], 400),
        (["Content-Length: 0x10"], 400),
        (["Content-Length: 5", "Content-Length: 6"], 411),
        ([], 411),
        (["Transfer-Encoding: chunked"], 411),
        (["Content-Length: 500"], 400),  # but the connection ends before
        (["Content-Length: " + "9" * 60000], 400),
        (["X: " + "y" * 70000], 431),
        ([f"X-{number}: y" for number in range(200)], 431),
    ],
)
def test_lengths(served, lines, status):
    host = f"Host: 127.0.0.1:{served.server_port}"
    head = ["POST /api/look HTTP/1.1", host, "Content-Type: application/json", *lines]
    answer = send(served, "\r\n".join([*head, "", "{}"]).encode())
    assert answer.startswith(f"HTTP/1.0 {status} ".encode()), answer[:80]
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]


def test_a_huge_body_gets_its_answer(served):
    """Although it is not read to its end, and the client sends on."""
    status, _, body = look(served, pixels=[0] * 1_000_000)
    assert status == 413 and "longer than" in json.loads(body)["error"]
    assert is_serving(served)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"GET",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        bytes(range(256)),
    ],
)
def test_what_is_no_request(served, data):
    answer = send(served, data)
    assert not answer or b'{"error"' in answer
    assert is_serving(served)


def test_slow_requests_end(networks, monkeypatch):
    """Also those that go on byte by byte, and they keep nobody else waiting."""
    monkeypatch.setattr(server, "PATIENCE", 0.6)
    with serving(networks) as running:
        head = f"POST /api/look HTTP/1.1\r\nHost: 127.0.0.1:{running.server_port}\r\n".encode()
        body = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        start = time.monotonic()
        with socket.create_connection(running.server_address[:2], timeout=5) as silent:
            with socket.create_connection(running.server_address[:2], timeout=5) as dripping:
                silent.sendall(head)
                dripping.sendall(head + body)
                assert is_serving(running)
                dripping.settimeout(0.1)
                answer = b""
                while b"\n" not in answer.partition(b"\r\n\r\n")[2] and time.monotonic() < start + 5:
                    with contextlib.suppress(TimeoutError):
                        dripping.sendall(b" ")
                        answer += dripping.recv(1 << 16)
                assert answer.startswith(b"HTTP/1.0 408 ") and b"took too long" in answer
            assert silent.recv(100) == b""
        assert time.monotonic() - start < 4


def test_more_connections_than_one_answers(networks, monkeypatch):
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 3)
    with serving(networks) as running:
        address = running.server_address[:2]
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection(address, timeout=5))
            time.sleep(0.2)
            with socket.create_connection(address, timeout=5) as refused:
                assert refused.recv(10) == b""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if is_serving(running):
                    return
            time.sleep(0.1)
        raise AssertionError("the server answers no more")


def test_a_network_that_fails_leaves_it_serving(networks, monkeypatch):
    with serving(networks) as running:
        with monkeypatch.context() as patch:
            patch.setattr(networks[0], "look", lambda *_: 1 / 0)
            status, _, body = look(running)
            assert status == 500 and json.loads(body)["error"] == "the network failed: ZeroDivisionError"
        assert is_serving(running)


def test_requests_at_a_time_get_their_own_answers(served, networks):
    images = [[(seed * place) % 256 for place in range(784)] for seed in range(1, 9)]
    expected = [networks[0].look(image)["scores"] for image in images]
    found = [None] * len(images)

    def work(place):
        found[place] = json.loads(look(served, pixels=images[place])[2])["scores"]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def fuzzed(generator, served):
    """A request that is right or wrong in some places."""
    choose = generator.choice
    values = {"model": 0, "pixels": PIXELS, "target": None}
    for _ in range(generator.randrange(3)):
        junk = [None, True, -1, 3, 2.5, 1e308, "x", [], {}, [[]] * 784, [255] * 784, [0] * 783, 10**40, "\ud800"]
        values[choose(["model", "pixels", "target", "capsules", "extra", "__proto__"])] = choose(junk)
    body = json.dumps(values).encode()
    if generator.random() < 0.3:
        place = generator.randrange(len(body))
        body = body[:place] + generator.randbytes(generator.randrange(8)) + body[place + generator.randrange(9) :]
    port = served.server_port
    lines = [
        f"{choose(['POST'] * 40 + ['GET', 'PUT', 'post', ''])} "
        f"{choose(['/api/look'] * 40 + ['/api/draw', '/', '/../x', '/api/look?x', 'x'])} "
        f"{choose(['HTTP/1.1'] * 40 + ['HTTP/1.0', 'HTTP/2.0', 'HTTP/x', ''])}",
        f"Host: {choose([f'127.0.0.1:{port}'] * 30 + [f'localhost:{port}', 'evil.example', ''])}",
        f"Content-Type: {choose(['application/json'] * 20 + ['text/plain', ''])}",
        f"Content-Length: {choose([len(body)] * 30 + [0, len(body) - 1, len(body) + 1, -1, 10**9, 'x'])}",
    ]
    if generator.random() < 0.2:
        extra = ["Origin: http://evil.example", "Transfer-Encoding: chunked", "Content-Length: 3", "no colon", ": x"]
        lines.insert(generator.randrange(1, 5), choose(extra))
    data = "\r\n".join([*lines, "", ""]).encode() + body
    return data[: generator.randrange(len(data))] if generator.random() < 0.1 else data


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_requests(served, count):
    generator = random.Random(count)
    statuses = {}
    for _ in range(count):
        answer = send(served, fuzzed(generator, served))
        if not answer:
            continue
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        statuses[status] = statuses.get(status, 0) + 1
        assert status == 200 or 400 <= status < 500, (status, answer)
        if status != 200:
            assert list(json.loads(body)) == ["error"]
    assert is_serving(served)
    assert {200, 400, 403, 404, 405, 411, 413, 415} <= set(statuses) and statuses[200] > count / 20, statuses


def test_hosts_that_others_reach(networks):
    for host in ("0.0.0.0", "192.0.2.1", "example.org", "::"):
        with pytest.raises(UsageError, match="is reached from other machines"):
            ExplorerServer(networks, host)
    with serving(networks, host="0.0.0.0", open_to_network=True) as running:
        port = running.server_port
        assert running.knows(f"192.0.2.7:{port}") and running.knows(f"{socket.gethostname()}:{port}")
        assert not running.knows(f"evil.example:{port}")
        assert is_serving(running)


def test_a_port_that_is_taken(served, networks):
    with pytest.raises(UsageError, match=f"--port {served.server_port} cannot be served .*give another --port"):
        ExplorerServer(networks, port=served.server_port)
