"""The client of the HTTP API against servers that are slow, hostile, not there, or no ground station; and against the real one.

The servers here are real sockets that send bytes written by hand, so that nothing of ours makes both ends agree.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time

import pytest
from web_rig import sample, station, until

from ground_station import mission_client
from ground_station.mission_client import MissionClient, MissionError, MissionRefused, Station, station_of
from ground_station.web_server import Options


@contextlib.contextmanager
def serving(*answers, tls: ssl.SSLContext | None = None):
    """A server that gives each connection the next of `answers` (bytes, or what sends them); the last one again and again."""
    listener = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []
    stop = threading.Event()

    def serve(link, answer) -> None:
        with contextlib.suppress(OSError), link:
            link.settimeout(10)
            heard.append(link.recv(65_536))
            if callable(answer):
                answer(link, stop)
            else:
                link.sendall(answer)

    def run() -> None:
        count = 0
        while True:
            try:
                link, _ = listener.accept()
                link = link if tls is None else tls.wrap_socket(link, server_side=True)
            except ssl.SSLError:
                continue
            except OSError:
                return
            threading.Thread(target=serve, args=(link, answers[min(count, len(answers) - 1)]), daemon=True).start()
            count += 1

    threading.Thread(target=run, daemon=True).start()
    scheme = "http" if tls is None else "https"
    try:
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", heard
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def http(body: bytes, status: str = "200 OK", kind: str = "application/json", *more: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", *more]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def stream_head() -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def client(url: str, token: str = "", timeout_s: float = 5.0) -> MissionClient:
    return MissionClient(Station(url, token), timeout_s)


def test_an_answer():
    """The control of what is refused below."""
    with serving(http(b'{"nodes": []}')) as (url, heard):
        assert client(url, "smo_x").get("nodes", filter="a b", lines=None) == {"nodes": []}
    assert heard[0].startswith(b"GET /api/v1/nodes?filter=a+b HTTP/1.1") and b"Authorization: Bearer smo_x" in heard[0]


@pytest.mark.parametrize(
    "answer",
    [
        http(b"<html>", kind="text/html"),
        http(b"[1]"),
        http(b'{"a": NaN}'),
        http(b"[" * 100_000),
        http(b'"\xff"'),
        b"SSH-2.0-OpenSSH_9\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 999999999999 " + b"x" * 200_000,
    ],
    ids=["html", "list", "nan", "deep", "bytes", "ssh", "nothing", "cut", "chunk", "line"],
)
def test_what_is_no_ground_station(answer):
    with serving(answer) as (url, _), pytest.raises(MissionError) as caught:
        client(url).get("nodes")
    assert caught.value.fix and "spacemoe up" in str(caught.value)


def test_nobody_there_names_the_command():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(MissionError, match="no ground station answers at .*refused.*spacemoe demo"):
        client(f"http://127.0.0.1:{port}").get("nodes")


def test_an_answer_without_end_is_cut(monkeypatch):
    monkeypatch.setattr(mission_client, "MAX_ANSWER_BYTES", 1_000_000)

    def endless(link, stop):
        link.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while not stop.is_set():
            link.sendall(b" " * 65_536)

    with serving(endless) as (url, _):
        with pytest.raises(MissionError, match="over 1000000 bytes"):
            client(url).get("nodes")
        with pytest.raises(MissionError, match="over 1000000 bytes"):
            list(client(url).stream())


def test_a_drip_is_not_waited_for():
    def drip(link, stop):
        link.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while not stop.wait(0.05):
            link.sendall(b" ")

    with serving(drip) as (url, _), pytest.raises(MissionError, match="takes over 0.5 s"):
        client(url, timeout_s=0.5).get("nodes")


def test_a_redirect_gets_no_token():
    with serving(http(b'{"got": 1}')) as (other, heard):
        with serving(http(b"", "302 Found", "text/html", f"Location: {other}/x")) as (url, _):
            with pytest.raises(MissionError) as caught:
                client(url, "smo_secret").get("nodes")
    assert caught.value.status == 302 and not heard


def test_proxies_are_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(http(b'{"a": 1}')) as (url, _):
        assert client(url).get("nodes") == {"a": 1}


@pytest.mark.parametrize(
    "status, kind", [("400 Bad Request", MissionRefused), ("404 Not Found", MissionRefused), ("503 No", MissionError)]
)
def test_errors_keep_their_fix(status, kind):
    body = json.dumps({"error": {"message": "no such\x1b[31m thing", "fix": "name another"}}).encode()
    with serving(http(body, status)) as (url, _), pytest.raises(MissionError) as caught:
        client(url).get("nodes")
    assert type(caught.value) is kind and caught.value.fix == "name another" and caught.value.status == int(status[:3])
    assert isinstance(caught.value, ValueError) == (kind is MissionRefused)  # so that the exit code is 2


def test_the_stream_is_read_as_the_standard_says():
    """WHATWG HTML 9.2.6: comments, fields without a space, several data lines, CRLF, an event without data."""
    frames = b': hello\n\nevent: a\ndata: {"x":\ndata: 1}\n\nevent:b\r\ndata:{"y":2}\r\n\r\nevent: none\n\nid: 7\ndata: {}\n\ndata: {"cut"'
    with serving(stream_head() + frames) as (url, _):
        assert list(client(url).stream()) == [("a", {"x": 1}), ("b", {"y": 2}), ("message", {})]


def test_follow_connects_again_but_not_without_right():
    one = stream_head() + b'event: snapshot\ndata: {"n": 1}\n\n'
    denied = http(b'{"error": {"message": "no valid token", "fix": "x"}}', "401 Unauthorized")
    told, slept = [], []
    with serving(one, one, http(b"", "503 Busy"), one, denied) as (url, _):
        got = []
        with pytest.raises(MissionError, match="no valid token: give a token by --token-file"):
            for each in client(url).follow(told.append, slept.append):
                got.append(each)
    assert got == [("snapshot", {"n": 1})] * 3 and len(told) == 4
    assert slept == [0.5, 0.5, 1.0, 0.5]  # longer where it fails again, anew after a success


def test_follow_fails_at_once_where_nobody_is():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(MissionError):
        next(client(f"http://127.0.0.1:{port}").follow(lambda _: None))


def test_events_that_were_missed_come_once_after_a_break():
    def row(at: float, text: str) -> dict:
        return {"at_utc_s": at, "node": "n", "kind": "k", "text": text, "severity": "info"}

    now = time.time()
    rows = [row(now + i, f"e{i}") for i in range(5)]
    begin = stream_head() + b"event: snapshot\ndata: {}\n\n"

    def event(i: int) -> bytes:
        return b"event: event\ndata: " + json.dumps(rows[i]).encode() + b"\n\n"

    script = (
        begin + event(1),  # then it breaks, and 2 and 3 happen meanwhile
        http(json.dumps({"events": rows[:1]}).encode()),
        begin + event(4),
        http(json.dumps({"events": rows[:4]}).encode()),
    )
    with serving(*script) as (url, heard):
        stream = client(url).follow_events({"lines": 50, "node": "n"}, lambda _: True, lambda _: None, lambda _: None)
        got = [next(stream)["text"] for _ in range(5)]
    assert got == ["e0", "e1", "e2", "e3", "e4"]
    asked = [each.split()[1].decode() for each in heard if b"/events?" in each]
    assert "since" not in asked[0] and "lines=50" in asked[0] and f"since={rows[1]['at_utc_s'] - 5}" in asked[1]


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    for name in ("SPACEMOE_URL", "SPACEMOE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert station_of(None, None).url == "http://127.0.0.1:8642"
    monkeypatch.setenv("SPACEMOE_URL", "https://moon.example:1/")
    monkeypatch.setenv("SPACEMOE_TOKEN", "smo_env")
    found = station_of(None, None)
    assert (found.url, found.token) == ("https://moon.example:1", "smo_env") and "smo_env" not in repr(found)
    file = tmp_path / "token"
    file.write_text("smo_file\n")
    with pytest.raises(ValueError, match="chmod 600"):
        station_of(None, file)
    file.chmod(0o600)
    assert station_of("http://[::1]:8642", file).token == "smo_file"
    file.write_text("a\nHost: b")
    with pytest.raises(ValueError, match="printable"):
        station_of(None, file)
    for bad in ("ftp://a", "127.0.0.1:8642", "http://", "http://a:99999", "http://u:p@a", "http://a/?x=1"):
        with pytest.raises(ValueError, match="is no address"):
            station_of(bad, None)


def test_a_certificate_of_strangers_is_not_trusted_and_a_named_authority_is(tmp_path):
    from ground_station import fleet_records

    folder = fleet_records.FleetFolder.create(tmp_path / "lab", "lab", ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder.path(fleet_records.GROUND_CERT), folder.path(fleet_records.GROUND_KEY))
    with serving(http(b'{"a": 1}'), tls=context) as (url, heard):
        with pytest.raises(MissionError, match="is not trusted .*--ca FILE"):
            client(url, "smo_secret").get("nodes")
        assert not heard
        known = Station(url, "smo_secret", folder.path(fleet_records.CA_CERT))
        assert MissionClient(known, 5.0).get("nodes") == {"a": 1}


def test_a_real_station_with_tokens(tmp_path):
    from ground_station import web_tokens

    tokens = tmp_path / "tokens.json"
    viewer, operator = (web_tokens.add(tokens, name, name) for name in ("viewer", "operator"))
    with station(tmp_path, Options(port=0, tokens=tokens)) as running:
        running.board("sat-1").telemetry(sample("temp_c", 41.5, "degC"))
        url = running.url.rstrip("/")

        def value():
            for node in client(url, viewer).get("nodes")["nodes"]:
                return node["signals"].get("temp_c", {}).get("value")

        assert until(lambda: value() == 41.5)
        for token in ("", "smo_wrong"):
            with pytest.raises(MissionError, match="--token-file") as caught:
                client(url, token).get("nodes")
            assert caught.value.status == 401
        order = {"node": "sat-1", "name": "ping", "arguments": {}}
        with pytest.raises(MissionError, match="operator's token"):
            client(url, viewer).post("commands", order)
        assert client(url, operator).post("commands", order)["state"] == "ok"
        kind, content = next(client(url, viewer).stream())
        assert kind == "snapshot" and content["fleet"]["rows"][0][0] == "sat-1"
