"""Who may come in: loopback's own rules, tokens and roles beyond it, browsers led here from elsewhere, limits of rate and size.

Asked over real sockets by the standard library's HTTP client, with the headers that a browser sends (Fetch standard: Origin,
Sec-Fetch-Site) written out by hand.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import stat
import subprocess

import pytest
from web_rig import Events, ask, station, until

from ground_station import web_tokens
from ground_station.web_access import POST, Buckets, Limit, Rules, host_allowed, same_origin
from ground_station.web_server import Options, WebError, rules_of, serving

PING = {"node": "n1", "name": "ping"}


@contextlib.contextmanager
def with_board(folder, options: Options = Options(port=0)):
    with station(folder, options) as running:
        running.board("n1")
        until(lambda: "n1" in running.control.snapshot())
        yield running


@pytest.fixture
def local(tmp_path):
    with with_board(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One for the tests that change nothing."""
    with with_board(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture
def guarded(tmp_path):
    """A station that asks for tokens, as beyond loopback, on a loopback address: a test opens no port to others."""
    path = tmp_path / "tokens.json"
    tokens = {role: web_tokens.add(path, f"a-{role}", role) for role in web_tokens.ROLES}
    with with_board(tmp_path, Options(port=0, tokens=path)) as running:
        yield running, tokens, path


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# ---------------------------------------------------------------- loopback


def test_on_loopback_everyone_operates_and_every_answer_is_guarded(local):
    me = local.get("/api/v1/me")
    assert me.tree == {"name": "local", "role": "operator", "session": False}
    for path in ("/", "/api/v1/nodes", "/static/main.js", "/api/v1/nothing"):
        headers = local.get(path).headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'" and policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
        assert headers["x-content-type-options"] == "nosniff"
    assert local.get("/api/v1/nodes").headers["cache-control"] == "no-store"
    assert local.post("/api/v1/commands", PING).tree["state"] == "ok"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_name_that_was_rebound_to_loopback_gets_nothing(shared, host):
    answer = shared.get("/api/v1/nodes", headers={"Host": host})
    assert answer.status == 403 and b"n1" not in answer.body


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:1", "[::1]:8642"])
def test_names_of_loopback_will_do_also_through_a_tunnel(shared, host):
    assert shared.get("/api/v1/nodes", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://localhost"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_a_page_from_elsewhere_cannot_post(shared, headers):
    answer = shared.post("/api/v1/commands", PING, {"Host": "localhost:9000", **headers})
    assert answer.status in (403, 415)
    assert shared.mission.commands() == [] and shared.boards[0].commands == []


def test_the_own_page_can_post(local):
    headers = {"Host": "localhost:9000", "Origin": "http://localhost:9000", "Sec-Fetch-Site": "same-origin"}
    assert local.post("/api/v1/commands", PING, headers).status == 200


# ---------------------------------------------------------------- tokens and roles


def test_no_token_gets_401_and_nothing_else(guarded):
    running, _, _ = guarded
    paths = ("/", "/static/main.js", "/api/v1/me", "/api/v1/nodes", "/api/v1/stream", "/metrics", "/v1/models", "/x")
    for path in paths:
        for headers in ({}, bearer("wrong"), {"Cookie": "spacemoe_session=wrong"}, {"Authorization": "Basic eDp5"}):
            answer = running.get(path, headers=headers)
            assert answer.status in (401, 429), path
            assert set(answer.tree) == {"error"} and b"n1" not in answer.body
    assert running.post("/api/v1/commands", PING).status == 401
    page = running.get("/", headers={"Accept": "text/html"})
    assert page.status == 401 and b"password" in page.body and b"n1" not in page.body


def test_a_viewer_sees_and_cannot_command(guarded):
    running, tokens, _ = guarded
    viewer, operator = bearer(tokens["viewer"]), bearer(tokens["operator"])
    assert [each["node"] for each in running.get("/api/v1/nodes", headers=viewer).tree["nodes"]] == ["n1"]
    for path in ("/api/v1/commands", "/api/v1/alarms/x/ack", "/v1/completions"):
        answer = running.post(path, PING, viewer)
        assert answer.status == 403 and "viewer" in answer.tree["error"]["message"]
    assert [command for command in running.boards[0].commands if command["name"] == "ping"] == []
    done = running.post("/api/v1/commands", PING, operator).tree  # the same by an operator goes
    assert (done["state"], done["who"]) == ("ok", "a-operator")


def test_a_browser_signs_in_and_out(guarded):
    running, tokens, _ = guarded
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    refused = ask(running.url, "/login", "POST", "token=wrong", form)
    assert refused.status == 401 and "set-cookie" not in refused.headers
    answer = ask(running.url, "/login", "POST", f"token={tokens['viewer']}", form)
    cookie = answer.headers["set-cookie"]
    assert answer.status == 303 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert tokens["viewer"] not in cookie
    session = {"Cookie": cookie.partition(";")[0]}
    assert running.get("/api/v1/me", headers=session).tree["role"] == "viewer"
    assert running.post("/api/v1/commands", PING, session).status == 403
    cross = ask(running.url, "/login", "POST", f"token={tokens['viewer']}", form | {"Origin": "http://evil.example"})
    assert cross.status == 403
    assert running.post("/logout", "", session).status == 303
    assert running.get("/api/v1/me", headers=session).status == 401


def test_a_token_that_is_removed_is_refused_and_its_stream_ends(guarded):
    running, tokens, path = guarded
    viewer = bearer(tokens["viewer"])
    with Events(running.url, viewer) as stream:
        stream.next("snapshot")
        web_tokens.remove(path, "a-viewer")
        until(lambda: running.get("/api/v1/me", headers=viewer).status in (401, 429))
        with pytest.raises(AssertionError, match="ended"):
            stream.next("nothing of the kind")
    assert running.get("/api/v1/me", headers=bearer(tokens["operator"])).status == 200


def test_guessing_is_slowed_down_and_a_good_token_is_not(guarded):
    running, tokens, _ = guarded
    found = [running.get("/api/v1/me", headers=bearer(f"guess-{i}")) for i in range(15)]
    assert {answer.status for answer in found} == {401, 429}
    assert int(found[-1].headers["retry-after"]) >= 1
    assert running.get("/api/v1/me", headers=bearer(tokens["viewer"])).status == 200


def test_posts_are_limited_in_rate_and_size(local):
    dry = PING | {"dry_run": True}
    found = [local.post("/api/v1/commands", dry).status for _ in range(int(POST.burst) + 20)]
    assert found[0] == 200 and 429 in found
    assert local.get("/api/v1/nodes").status == 200
    assert ask(local.url, "/api/v1/nodes", "GET", None, {"Content-Length": "9" * 30}).status == 400


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_its_length(local):
    assert local.post("/api/v1/commands", json.dumps({"node": "x" * 70_000})).status == 413

    def chunks():
        for _ in range(80):
            yield b"x" * 1000

    link = http.client.HTTPConnection("127.0.0.1", local.served.port, timeout=10)
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    link.request("POST", "/api/v1/commands", chunks(), headers, encode_chunked=True)
    assert link.getresponse().status == 413
    link.close()


# ---------------------------------------------------------------- the file of tokens


def test_only_hashes_are_kept_in_a_file_of_ones_own(tmp_path):
    path = tmp_path / "tokens.json"
    token = web_tokens.add(path, "ada", "operator")
    assert token not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) > 40  # 256 bits in base64
    tokens = web_tokens.Tokens(path)
    assert tokens.person(token) == web_tokens.Person("ada", "operator")
    assert tokens.person(token + "x") is None and tokens.person("") is None and tokens.person("\ud800") is None
    with pytest.raises(web_tokens.TokenError, match="remove it first"):
        web_tokens.add(path, "ada", "viewer")
    path.chmod(0o644)
    with pytest.raises(web_tokens.TokenError, match="chmod 600"):
        web_tokens.read(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"tokens": [{}]}', '{"tokens": [{"name":"a","role":"root","sha256":"x"}]}', "[" * 99999]
)
def test_a_spoilt_file_is_told(tmp_path, text):
    path = tmp_path / "tokens.json"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(web_tokens.TokenError, match="no file of tokens"):
        web_tokens.Tokens(path)


# ---------------------------------------------------------------- rules


def test_beyond_loopback_tokens_and_a_certificate_are_needed(tmp_path):
    path = tmp_path / "tokens.json"
    with pytest.raises(WebError, match="file of tokens"):
        rules_of(Options(bind="0.0.0.0"))
    with pytest.raises(web_tokens.TokenError, match="holds no token"):
        rules_of(Options(bind="0.0.0.0", tokens=path, plain=True))
    web_tokens.add(path, "a", "viewer")
    with pytest.raises(WebError, match="certificate"):
        rules_of(Options(bind="192.0.2.1", tokens=path))
    rules = rules_of(Options(bind="0.0.0.0", tokens=path, plain=True, hosts=("Ground.example.",)))
    assert host_allowed("ground.example:8642", rules) and host_allowed("192.0.2.1", rules)
    assert not host_allowed("evil.example", rules)
    with pytest.raises(WebError, match="no address"):
        rules_of(Options(bind="nowhere"))


def test_origin_is_compared_with_the_scheme_that_is_spoken():
    headers = {"host": "a.example:1", "origin": "http://a.example:1"}
    assert same_origin(headers, secure=False) and not same_origin(headers, secure=True)
    assert same_origin({"host": "a"}, secure=True)
    assert not host_allowed("a.example", Rules())


def test_a_bucket_fills_again_and_does_not_grow_without_end():
    now = [0.0]
    buckets = Buckets(lambda: now[0])
    limit = Limit(2.0, 3)
    assert [buckets.wait_s("a", limit) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert buckets.wait_s("b", limit) == 0.0  # another client has its own
    now[0] = 0.5
    assert buckets.wait_s("a", limit) == 0.0
    for i in range(10_000):
        buckets.wait_s(str(i), limit)
    assert len(buckets._left) <= 4096


def test_over_tls_the_cookie_is_secure_and_plain_http_gets_nothing(tmp_path):
    certificate, key, path = tmp_path / "c.pem", tmp_path / "k.pem", tmp_path / "tokens.json"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    token = web_tokens.add(path, "a", "viewer")
    with station(tmp_path, Options(port=0, tokens=path, certificate=certificate, key=key)) as running:
        assert running.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = ask(running.url, "/login", "POST", f"token={token}", form, trust)
        assert "; Secure" in answer.headers["set-cookie"] and "strict-transport-security" in answer.headers
        with pytest.raises(OSError):
            ask(running.url.replace("https", "http"), "/api/v1/me")
        with (
            pytest.raises(WebError, match="cannot be used"),
            serving(running.mission, Options(port=0, tokens=path, certificate=key, key=certificate)),
        ):
            pass


def test_a_port_that_is_taken_is_told_or_another_is_had(local):
    taken = local.served.port
    with pytest.raises(WebError, match=f"port {taken}"), serving(local.mission, Options(port=taken, fallback=False)):
        pass
    with serving(local.mission, Options(port=taken)) as second:
        assert second.port != taken and ask(second.url, "/api/v1/me").status == 200
