"""A reward over HTTP: the same scores, and a clear status for everything that is not a request."""

import base64
import http.client
import http.server
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

from rewards.checks import png
from rewards.compose import parse_rewards, weighted
from rewards.network.remote import Limits, Remote, Server

IMAGES = (255 * torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))).round() / 255
PROMPTS = list("abcde")
TOKEN = "secret"
LIMITS = Limits(body=20_000, images=6, pixels=40_000, connections=64, seconds=120.0)
PATIENCE = 60.0  # seconds that a test waits for a state before it fails


class Gated:
    """Brightness, once the gate is open, and the most scored at a time."""

    differentiable = False

    def __init__(self, opened: bool = True):
        self.gate, self.running, self.most = threading.Event(), 0, 0
        if opened:
            self.gate.set()

    def __call__(self, images, prompts):
        if "refuse" in prompts:
            raise ValueError("cannot judge 'refuse'")
        if "fail" in prompts:
            raise KeyError("a secret of the server")
        if "gone" in prompts:
            raise FileNotFoundError("a secret of the server")
        if "nan" in prompts:
            return images.mean(dim=(1, 2, 3)) * float("nan")
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.gate.wait(PATIENCE)
        self.running -= 1
        return images.mean(dim=(1, 2, 3))


@contextmanager
def serving(reward=None, limits=LIMITS, token=TOKEN):
    with Server(reward or Gated(), token=token, limits=limits) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server():
    with serving() as server:
        yield server


def ask(
    server, body: bytes, token: str = TOKEN, path: str = "/score", method: str = "POST", **headers
) -> tuple[int, str]:
    """Status and what is said."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=PATIENCE)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    about = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"} | given
    connection.request(method, path, body, about)
    answer = connection.getresponse()
    said = answer.read().decode()
    connection.close()
    return answer.status, json.loads(said).get("error", said) if said.startswith("{") else said


def black(side: int) -> np.ndarray:
    return np.zeros((side, side, 3), np.uint8)


SMALL = [black(4)]


def body(images=SMALL, prompts=None) -> bytes:
    pictures = [base64.b64encode(png(x)).decode() for x in images]
    return json.dumps({"images": pictures, "prompts": prompts or ["a"] * len(pictures)}).encode()


def test_scores_are_those_of_the_reward(server):
    reward = Remote(server.url, TOKEN, batch_size=2)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), IMAGES.mean(dim=(1, 2, 3)))
    assert reward(IMAGES, PROMPTS).dtype == torch.float32
    assert not reward.differentiable


def test_images_of_different_sizes_keep_their_order(server):
    images = [np.full((side, side, 3), 10 * side, np.uint8) for side in (4, 8, 4, 6)]
    status, said = ask(server, body(images))
    assert status == 200
    np.testing.assert_allclose(json.loads(said)["scores"], [40 / 255, 80 / 255, 40 / 255, 60 / 255], atol=1e-6)


def test_url_is_the_name_of_a_reward(server, monkeypatch):
    monkeypatch.setenv("DIFFTUNE_REWARD_TOKEN", TOKEN)
    assert parse_rewards([f"{server.url}=0.5"]) == {server.url: 0.5}
    torch.testing.assert_close(weighted({server.url: 0.5})(IMAGES, PROMPTS), 0.5 * IMAGES.mean(dim=(1, 2, 3)))


REQUESTS = {  # what is sent, and what is answered
    "no json": ({"body": b"\x80\x04K\x01."}, 400, "the body is not JSON"),  # a pickle
    "deep json": ({"body": b"[" * 9000}, 400, "the body is not JSON"),
    "another json": ({"body": b"[1, 2]"}, 400, "the body is a JSON object"),
    "numbers": ({"body": b'{"images": [1], "prompts": ["a"]}'}, 400, "the body is {images: "),
    "nothing": ({"body": b'{"images": [], "prompts": []}'}, 400, "the body is {images: "),
    "unpaired": ({"body": body(prompts=["a", "b"])}, 400, "1 images and 2 prompts"),
    "no base64": ({"body": b'{"images": ["%%"], "prompts": ["a"]}'}, 400, "an image is not a PNG in base64"),
    "no png": ({"body": b'{"images": ["aGVsbG8="], "prompts": ["a"]}'}, 400, "an image is not a PNG in base64"),
    "half a png": (
        {"body": json.dumps({"images": [base64.b64encode(png(np.random.default_rng(0).integers(
            0, 255, (32, 32, 3), np.uint8))[:900]).decode()], "prompts": ["a"]}).encode()},
        400, "an image is a PNG that is not whole",
    ),
    "too many pixels": ({"body": body([black(210)])}, 413, "images of 44100 pixels in one request"),
    "too many in all": ({"body": body([black(150)] * 2)}, 413, "images of 45000 pixels"),
    "too many images": ({"body": body([black(1)] * 7)}, 413, "7 images in one request: 6 is the limit"),
    "too many bytes": ({"body": b"x" * 300_000}, 413, "300000 bytes in one request: 20000 is the limit"),
    "wrong token": ({"body": body(), "token": "guess"}, 401, "the token is wrong"),
    "wrong letters": ({"body": body(), "token": "\xe9"}, 401, "the token is wrong"),
    "wrong path": ({"body": body(), "path": "/other"}, 404, "scores are at POST /score"),
    "wrong method": ({"body": b"", "method": "GET"}, 404, "scores are at POST /score"),
    "other method": ({"body": b"", "method": "DELETE"}, 501, "Unsupported method"),
    "another type": ({"body": body(), "Content_Type": "text/plain"}, 415, "a request is application/json"),
    "another site": ({"body": body(), "Origin": "http://evil.example"}, 403, "another site may not ask here"),
    "no length": ({"body": b"", "Content_Length": "x"}, 411, "a request says its Content-Length"),
    "refused": ({"body": body(prompts=["refuse"])}, 422, "cannot judge 'refuse'"),
    "failed": ({"body": body(prompts=["fail"])}, 500, "the reward failed: KeyError"),
    "failed to read": ({"body": body(prompts=["gone"])}, 500, "the reward failed: FileNotFoundError"),
    "not finite": ({"body": body(prompts=["nan"])}, 422, "a score is not finite at index 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REQUESTS)
def test_what_is_no_request_has_a_status_and_a_sentence(server, what):
    sent, status, sentence = REQUESTS[what]
    found, said = ask(server, **sent)
    assert found == status and sentence in said
    assert "secret of the server" not in said
    assert ask(server, body())[0] == 200  # and the server goes on


def test_picture_of_another_format_is_refused(server):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "BMP")
    sent = {"images": [base64.b64encode(file.getvalue()).decode()], "prompts": ["a"]}
    assert ask(server, json.dumps(sent).encode()) == (400, "an image is not a PNG in base64")


def test_client_says_what_the_server_said(server):
    with pytest.raises(
        ConnectionError, match=r"the reward server http://127.0.0.1:\d+ refused with 401: .*token is wrong"
    ):
        Remote(server.url, "guess")(IMAGES, PROMPTS)
    with pytest.raises(ConnectionError, match="refused with 422: .*cannot judge"):
        Remote(server.url, TOKEN)(IMAGES[:1], ["refuse"])


@contextmanager
def deaf():
    """The URL of a port that is taken, so that nobody else gets it, and at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_client_without_a_server_says_so():
    with deaf() as url, pytest.raises(ConnectionError, match=f"no scores from the reward server {url}: "):
        Remote(url, retries=0)(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match="starts with http:// or https://, not 'ftp://a'"):
        Remote("ftp://a")


@contextmanager
def listening_at(answer):
    """The URL of a server that calls `answer` with each connection, once its request has come."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE)

        def serve():
            with suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    with client, suppress(OSError):
                        asked = b""
                        while b"prompts" not in asked and (part := client.recv(2**20)):
                            asked += part
                        answer(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
    thread.join()


@contextmanager
def answering(*answers: bytes):
    """A server that gives these raw answers, one for each connection, the last one again and again; and its URL."""
    given = []

    def answer(client):
        given.append(answers[min(len(given), len(answers) - 1)])
        client.sendall(given[-1])
        client.shutdown(socket.SHUT_WR)
        while client.recv(2**20):
            pass

    with listening_at(answer) as url:
        yield url, given


GOOD_HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: 17\r\n\r\n"


@pytest.fixture
def slept(monkeypatch):
    """The seconds that the client waited, without waiting."""
    found = []
    monkeypatch.setattr("rewards.network.client.time.sleep", found.append)
    return found


def test_client_waits_no_longer_than_its_timeout():
    with serving(reward := Gated(opened=False)) as server:
        with pytest.raises(ConnectionError, match="no scores from the reward server .*timed out"):
            Remote(server.url, TOKEN, timeout=0.2)(IMAGES[:1], ["a"])
        reward.gate.set()  # it gave up before there was an answer


@pytest.mark.parametrize(
    "steady", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.0 100 Continue\r\n\r\n", GOOD_HEAD, b"HTTP/1.0 503 Busy\r\n\r\n"]
)
def test_client_waits_no_longer_for_an_answer_that_drips(steady):
    """In its first line, in its headers, in its body: each byte comes well within the time, and never the last one."""
    given = threading.Event()

    def drips(client):
        with suppress(OSError):
            client.sendall(steady)
            while not given.wait(0.05):
                client.sendall(b"1")

    with listening_at(drips) as url, pytest.raises(ConnectionError, match="no scores|refused with 503: 1*$"):
        try:
            Remote(url, timeout=0.4, retries=0)(IMAGES[:1], ["a"])
        finally:
            given.set()


@pytest.mark.parametrize("sent", [b"", GOOD_HEAD + b'{"sco', b"HTTP/1.0 200 OK\r\nContent-Le"])
def test_an_answer_that_ends_half_way_is_asked_for_again(sent, slept):
    with answering(sent, GOOD) as (url, given):
        assert Remote(url)(IMAGES[:1], ["a"]).tolist() == [0.5]
    assert len(given) == 2 and len(slept) == 1


def test_server_that_others_can_reach_needs_a_token():
    for host in ("0.0.0.0", "192.168.0.1", "example.org"):
        with pytest.raises(ValueError, match=f"{host} can be reached from elsewhere: give a token"):
            Server(Gated(), host)
    with serving(token="") as server:
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, body(), token="")[0] == 200
        assert ask(server, body(), token="one that nobody asked for")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "192.168.0.1", "", "[::1", "]"])
def test_without_a_token_only_this_machine_is_answered(host):
    """A page elsewhere whose name was pointed at 127.0.0.1 would ask with its own name."""
    with serving(token="") as server:
        assert ask(server, body(), Host=host) == (403, "this server is for this machine: ask it at 127.0.0.1")
        for own in ("localhost", "127.0.0.1:80", "[::1]:80"):
            assert ask(server, body(), Host=own)[0] == 200
    with serving() as server:  # who knows the token may call the machine by any name
        assert ask(server, body(), Host=host)[0] == 200


def test_server_that_cannot_start_says_why(server):
    with pytest.raises(OSError, match=r"cannot listen on 127.0.0.1, port \d+: .*in use; choose another --port"):
        Server(Gated(), port=server.server_port)
    with pytest.raises(ValueError, match="there is no device 'nowhere': "):
        Server(Gated(), device="nowhere")


def raw(said: str, status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.0 {status}", *headers, "", said]).encode()


GOOD = raw('{"scores": [0.5]}')
NONSENSE = {
    "a banner": (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0"),
    "nothing": (b"", "no scores from the reward server"),
    "many headers": (raw("{}", "200 OK", *(f"X-{i}: 1" for i in range(200))), "more than 100 headers"),
    "a long line": (raw("{}", "200 OK", "X: " + "1" * 70_000), "too|more than"),
    "deep json": (raw("[" * 200_000), "recursion"),
    "no json": (raw("<html>"), "Expecting value"),
    "a mapping": (raw('{"scores": {"1": 2}}'), "but not with"),
    "texts": (raw('{"scores": ["0.5"]}'), "but not with"),
    "truths": (raw('{"scores": [true]}'), "but not with"),
    "no object": (raw("[0.5]"), "but not with"),
    "no scores": (raw("{}"), "but not with"),
    "too many": (raw('{"scores": [1, 2]}'), "2 scores for 1 images"),
    "escapes": (raw('{"error": "\\u001b[2J\\u001b]0;owned\\u0007\\r\\nboo"}', "400 Bad"), r"\\x1b\[2J"),
    "a bell in the page": (raw("\x1b[31mred\x07", "500 Oops"), r"\\x1b\[31mred\\x07"),
    "a long page": (raw("x" * 10**6, "500 Oops"), "x" * 200 + r"\.\.\."),
    "a half of it": (raw("{", "200 OK", "Content-Length: 50"), "no scores from the reward server"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_of_a_server_is_one_sentence(what):
    answer, words = NONSENSE[what]
    with answering(answer) as (url, _), pytest.raises(ConnectionError, match=words) as error:
        Remote(url, retries=0)(IMAGES[:1], ["a"])
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("status", ["503 Busy", "429 Slow down", "502 Bad gateway", "504 Late"])
def test_a_busy_server_is_asked_again_when_it_says(status, slept):
    with answering(raw("", status, "Retry-After: 3"), raw("", status), GOOD) as (url, given):
        assert Remote(url)(IMAGES[:1], ["a"]).tolist() == [0.5]
    assert len(given) == 3
    assert 3 <= slept[0] <= 3.75 and 1 <= slept[1] <= 1.25


def test_a_server_that_stays_busy_is_an_error_in_the_end(slept):
    with answering(raw("", "503 Busy")) as (url, given), pytest.raises(ConnectionError, match="refused with 503"):
        Remote(url)(IMAGES[:1], ["a"])
    assert len(given) == 5
    assert all(low <= found <= 1.25 * low for found, low in zip(slept, (0.5, 1, 2, 4), strict=True))


def test_a_server_that_is_out_of_reach_is_asked_again_and_one_that_refuses_is_not(slept):
    with deaf() as url, pytest.raises(ConnectionError, match="refused"):
        Remote(url)(IMAGES[:1], ["a"])
    assert len(slept) == 4
    with answering(raw("", "401 No")) as (url, given), pytest.raises(ConnectionError, match="refused with 401"):
        Remote(url)(IMAGES[:1], ["a"])
    assert len(given) == 1 and len(slept) == 4


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (None, None),
        ("2", 2),
        ("-5", 0),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 2015 99999999999999:00:00 GMT", None),
        ("9" * 400, 10**9),
        ("9" * 9000, None),
        ("", None),
    ],
)
def test_retry_after_is_read_and_bounded(said, seconds):
    from rewards.network.client import pause, seconds_of

    assert seconds_of(said) == seconds
    assert 0 <= pause(3, seconds_of(said)) <= 120


def test_a_pause_is_up_to_a_quarter_longer_never_shorter():
    from rewards.network.client import pause

    pauses = [pause(2) for _ in range(200)]
    assert all(2 <= seconds < 2.5 for seconds in pauses) and max(pauses) - min(pauses) > 0.25


def test_one_in_five_refused_changes_no_score(slept):
    state = torch.get_rng_state()
    with answering(*[raw("", "503 Busy") if i % 5 == 0 else GOOD for i in range(50)]) as (url, given):
        assert Remote(url, batch_size=1)(IMAGES, PROMPTS).tolist() == [0.5] * 5
    assert len(given) == 7 and torch.equal(torch.get_rng_state(), state)


def test_client_follows_no_redirect():
    """Its token would go along."""
    asked = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            with pytest.raises(ConnectionError, match="refused with 302"):
                Remote(f"http://127.0.0.1:{other.server_port}", TOKEN)(IMAGES[:1], ["a"])
        finally:
            other.shutdown()
            thread.join()
    assert asked == ["/score"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def settled(count, before: int) -> bool:
    """Whether a count comes back to where it was."""
    return comes(lambda: count() <= before)


def comes(state) -> bool:
    """Whether a state comes about, for which `PATIENCE` is the longest wait."""
    end = time.monotonic() + PATIENCE
    while not (found := state()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def at_work(server, count) -> bool:
    """Whether so many requests have arrived, and nothing else holds a place."""
    return list(server.open.values()) == [None] * count


def test_fifty_clients_at_once_are_all_answered_and_nothing_is_left():
    reward = Gated()
    with serving(reward) as server:
        files, threads = open_files(), threading.active_count()

        def client(i: int) -> torch.Tensor:
            return Remote(server.url, TOKEN)(IMAGES[i % 5 : i % 5 + 1], ["a"])

        with ThreadPoolExecutor(50) as pool:
            scores = torch.cat(list(pool.map(client, range(100))))
        expected = IMAGES.mean(dim=(1, 2, 3))[torch.arange(100) % 5]
        torch.testing.assert_close(scores, expected)
        assert reward.most == 1  # one batch at a time
        assert settled(threading.active_count, threads) and settled(open_files, files)


def test_clients_beyond_the_limit_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr("rewards.network.http.DRAIN_SECONDS", PATIENCE)
    with serving(reward := Gated(opened=False), Limits(connections=2)) as server, ThreadPoolExecutor(8) as pool:
        taken = [pool.submit(ask, server, body()) for _ in range(2)]
        assert comes(lambda: at_work(server, 2))
        assert [status for status, _ in pool.map(lambda _: ask(server, body()), range(6))] == [503] * 6
        reward.gate.set()
        assert [future.result()[0] for future in taken] == [200, 200]
        assert comes(lambda: ask(server, body())[0] == 200)


HALF = (
    b"POST /score HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    b"Content-Length: 900\r\n\r\n{"
)


def test_clients_that_are_killed_or_silent_take_nothing_down(server):
    files, threads = open_files(), threading.active_count()
    for content in (
        b"",
        b"POST /sc",
        b"POST /score HTTP/1.1\r\nContent-Length: 900\r\n\r\n{",
        b"\x00" * 100 + b"\r\n\r\n",
    ):
        for linger in (False, True):
            client = socket.create_connection(server.server_address[:2])
            client.sendall(content)
            if linger:  # a reset in place of an orderly end, as of a process that was killed
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            client.close()
    silent = [socket.create_connection(server.server_address[:2]) for _ in range(5)]
    waiting = [socket.create_connection(server.server_address[:2]) for _ in range(2)]
    for client in waiting:
        client.sendall(HALF)
    assert ask(server, body())[0] == 200
    for client in silent + waiting:
        client.close()
    assert settled(threading.active_count, threads) and settled(open_files, files)
    assert ask(server, body())[0] == 200


def dripping(server, stop):
    """A client that sends a byte now and then, and comes back when it is dropped."""
    while not stop.is_set():
        with suppress(OSError), socket.create_connection(server.server_address[:2]) as client:
            client.settimeout(0.01)
            for byte in b"POST /score HTTP/1.1\r\n" + b"X: y\r\n" * 1000:
                if stop.wait(0.05):
                    return
                client.sendall(bytes([byte]))
                with suppress(TimeoutError):
                    if client.recv(1) == b"":
                        break


def test_honest_clients_are_answered_whoever_is_slow():
    """64 that say nothing and two that drip could hold their places for two minutes; 50 ask at once, one time each."""
    with serving() as server, ThreadPoolExecutor(52) as pool:
        silent = [socket.create_connection(server.server_address[:2]) for _ in range(64)]
        stop = threading.Event()
        slow = [pool.submit(dripping, server, stop) for _ in range(2)]
        asked = [pool.submit(Remote(server.url, TOKEN, retries=0), IMAGES[:1], ["a"]) for _ in range(50)]
        assert all(future.result().shape == (1,) for future in asked)
        stop.set()
        assert all(future.result() is None for future in slow)
        for client in silent:
            client.close()


def dropped(client, state=lambda: False) -> bool:
    """Whether a client that sends a byte now and then is dropped in the end, or until a state comes about."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not state():
        try:
            client.sendall(b"x")
        except OSError:
            return True
        time.sleep(0.02)
    return False


@contextmanager
def turned_away(server):
    """A client that got its 503."""
    with socket.create_connection(server.server_address[:2]) as client:
        client.settimeout(PATIENCE)
        assert client.recv(64).startswith(b"HTTP/1.0 503")
        yield client


def test_a_client_that_drips_after_its_503_is_dropped_and_holds_nobody_up(monkeypatch):
    with serving(reward := Gated(opened=False), Limits(connections=2)) as server, ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(ask, server, body()) for _ in range(2)]
        assert comes(lambda: at_work(server, 2))
        monkeypatch.setattr("rewards.network.http.DRAIN_SECONDS", 0.3)
        with turned_away(server) as client:
            assert dropped(client)
        monkeypatch.setattr("rewards.network.http.DRAIN_SECONDS", PATIENCE)
        with turned_away(server) as client:  # which drips all the while
            answered = threading.Event()
            drips = pool.submit(dropped, client, answered.is_set)
            reward.gate.set()
            assert [future.result()[0] for future in taken] == [200, 200]
            assert ask(server, body())[0] == 200
            answered.set()
            assert drips.result() is False


def left(client) -> bool:
    """Whether the server ends the connection, which was told nothing."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("begun", [b"", b"POST /score", HALF])
def test_a_request_that_is_silent_or_drips_is_dropped_after_the_total_time(begun):
    with serving(limits=Limits(seconds=0.4)) as server:
        for drips in (False, True):
            with socket.create_connection(server.server_address[:2]) as client:
                client.settimeout(PATIENCE)
                with suppress(ConnectionError):
                    client.sendall(begun)
                assert dropped(client) if drips else left(client)


def test_client_that_is_killed_while_it_waits_takes_nothing_down():
    with serving(reward := Gated(opened=False)) as server:
        threads = threading.active_count()
        client = socket.create_connection(server.server_address[:2])
        sent = body()
        about = f"Authorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
        head = f"POST /score HTTP/1.1\r\n{about}\r\n\r\n"
        client.sendall(head.encode() + sent)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        assert comes(lambda: at_work(server, 1))
        client.close()
        reward.gate.set()
        assert ask(server, body())[0] == 200
        assert settled(threading.active_count, threads)
