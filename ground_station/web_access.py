"""The door in front of page and API: who asks, whether a browser was led here, how often, how much. An ASGI layer around the app.

On loopback everyone on this machine is an operator, and what guards it is that a page from elsewhere can neither name this server
(Host: DNS rebinding) nor post to it (Origin, Sec-Fetch-Site: CSRF). Beyond loopback a token or the session of one is asked for.
Leaves out TLS (web_server.py) and the tokens themselves (web_tokens.py).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from ground_station.web_tokens import SESSION_S, Person, Tokens

COOKIE = "spacemoe_session"
LOCAL = Person("local", "operator")
MAX_BODY_BYTES = 64 * 1024
MAX_LONG_BODY_BYTES = 4 * 1024 * 1024  # of a request for tokens: many prompts at once
LONG_BODIES = "/v1/"
LOCAL_NAMES = frozenset({"localhost"})
MAX_CLIENTS = 4096
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),  # by `no-referrer` a browser hides the Origin of its own forms too
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'{style}; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
LOGIN_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;display:grid;place-content:center;min-height:90vh;"
    "margin:0 1rem}form{display:grid;gap:.6rem;width:min(22rem,90vw)}input,button{font:inherit;padding:.5rem}"
)
LOGIN_HASH = base64.b64encode(hashlib.sha256(LOGIN_STYLE.encode()).digest()).decode()
LOGIN_PAGE = (
    "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Sign in</title>"
    f"<style>{LOGIN_STYLE}</style><form method=post action=/login><h1>Mission control</h1>"
    "<label for=token>Token</label><input id=token name=token type=password autocomplete=current-password required autofocus>"
    "<button>Sign in</button></form></html>"
)


@dataclass(frozen=True)
class Limit:
    """`burst` at once, then `per_s`."""

    per_s: float
    burst: float


LOGIN = Limit(0.2, 10)  # also wrong tokens: a client that guesses
POST = Limit(5.0, 30)
TOKENS = Limit(100.0, 400)  # requests for tokens: the engine has its own queue


class Buckets:
    """A token bucket per (client, kind); the client that was seen longest ago makes room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._left: OrderedDict[tuple[str, Limit], tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, limit: Limit, take: float = 1.0) -> float:
        """0 and one is taken, or the seconds until there is one. `take` 0: only asks."""
        now_s = self._clock()
        left, then_s = self._left.pop((client, limit), (limit.burst, now_s))
        left = min(limit.burst, left + (now_s - then_s) * limit.per_s)
        granted = left >= 1.0
        self._left[client, limit] = (left - take if granted else left, now_s)
        while len(self._left) > MAX_CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if granted else (1.0 - left) / limit.per_s


@dataclass(frozen=True)
class Rules:
    """`tokens` None: loopback, everyone is LOCAL. `hosts`: names (no addresses) by which this server may be called beside those of
    loopback; `secure`: it speaks TLS."""

    tokens: Tokens | None = None
    hosts: frozenset[str] = field(default_factory=frozenset)
    secure: bool = False


def host_of(header: str) -> str:
    """The name or address of a Host header, lower case, without port and brackets."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def host_allowed(header: str, rules: Rules) -> bool:
    """Whether this server goes by that name. Beyond loopback any address will do: rebinding needs a name."""
    host = host_of(header)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".") in (LOCAL_NAMES if rules.tokens is None else LOCAL_NAMES | rules.hosts)
    return rules.tokens is not None or address.is_loopback


def same_origin(headers: dict[str, str], secure: bool) -> bool:
    """Whether a POST comes from this server's own page, or from no page at all."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    return origin.lower() == f"{'https' if secure else 'http'}://{headers.get('host', '').strip().lower()}"


class Refusal(Exception):
    """What is answered instead."""

    def __init__(self, status: int, message: str, fix: str, headers: tuple[tuple[bytes, bytes], ...] = ()):
        super().__init__(message)
        self.status, self.message, self.fix, self.headers = status, message, fix, headers


class Access:
    """ASGI: `app` sees only what may come in, with `scope["person"]`, and bodies within bounds."""

    def __init__(self, app, rules: Rules, clock: Callable[[], float] = time.monotonic):
        self._app, self._rules, self._buckets = app, rules, Buckets(clock)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        client = scope["client"][0] if scope.get("client") else ""
        sender = _headed(send, scope["path"], self._rules.secure)
        try:
            self._check(scope, headers, client)
            if scope["method"] == "POST" and scope["path"] == "/login" and self._rules.tokens is not None:
                await self._login(receive, sender)
                return
            if scope["method"] == "POST" and scope["path"] == "/logout":
                await self._logout(headers, sender)
                return
            limit = MAX_LONG_BODY_BYTES if scope["path"].startswith(LONG_BODIES) else MAX_BODY_BYTES
            if int(headers.get("content-length", "0") or 0) > limit:
                raise Refusal(413, f"a body of over {limit} bytes", "send less at once")
            await self._app(scope, _bounded(receive, limit), sender)
        except Refusal as refusal:
            page = refusal.status == 401 and "text/html" in headers.get("accept", "")
            await _answer(sender, refusal, page)

    def _check(self, scope, headers: dict[str, str], client: str) -> None:
        """Sets scope["person"].  Raises: Refusal."""
        path, method = scope["path"], scope["method"]
        if not host_allowed(headers.get("host", ""), self._rules):
            raise Refusal(
                403, "this server does not go by that name", "use its address, or start it with that --host-name"
            )
        changing = method not in ("GET", "HEAD", "OPTIONS")
        if changing and not same_origin(headers, self._rules.secure):
            raise Refusal(403, "a page from elsewhere sent this", "use this server's own page, or send no Origin")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            raise Refusal(400, "the Content-Length is no number", "send a number")
        tokens = self._rules.tokens
        if method == "POST" and path == "/login" and tokens is not None:
            self._spend(client, LOGIN)
            return
        person = LOCAL
        if tokens is not None:
            person, wrong = self._person(headers, tokens)
            if person is None:
                if wrong:
                    self._spend(client, LOGIN)
                raise Refusal(
                    401,
                    "no valid token",
                    "send Authorization: Bearer TOKEN, or sign in on the page",
                    ((b"www-authenticate", b"Bearer"),),
                )
        scope["person"] = person
        scope["still"] = lambda: tokens is None or self._person(headers, tokens)[0] is not None
        if changing and path != "/logout":
            if not person.may_command:
                raise Refusal(403, f"{person.name} is a viewer and may not do that", "use an operator's token")
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refusal(415, "the body is not JSON", "send Content-Type: application/json")
            self._spend(client, TOKENS if path.startswith(LONG_BODIES) else POST)

    def _person(self, headers: dict[str, str], tokens: Tokens) -> tuple[Person | None, bool]:
        """(who, whether a token was given that is wrong)."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if given:
            person = tokens.person(given.strip()) if scheme.lower() == "bearer" else None
            return person, person is None
        session = session_of(headers)
        return (tokens.of_session(session) if session else None), False

    def _spend(self, client: str, limit: Limit) -> None:
        if wait_s := self._buckets.wait_s(client, limit):
            after = str(max(1, math.ceil(wait_s)))
            raise Refusal(429, "too many requests", f"try again in {after} s", ((b"retry-after", after.encode()),))

    async def _login(self, receive, send) -> None:
        body = await _body(receive, 4096)
        given = parse_qs(body.decode("utf-8", "replace"), max_num_fields=4).get("token", [""])[0].strip()
        session = self._rules.tokens.open(given)
        if session is None:
            raise Refusal(401, "no valid token", "check the token, or ask for a new one")
        cookie = f"{COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={SESSION_S:.0f}"
        await _redirect(send, cookie + ("; Secure" if self._rules.secure else ""))

    async def _logout(self, headers: dict[str, str], send) -> None:
        if self._rules.tokens is not None and (session := session_of(headers)):
            self._rules.tokens.close(session)
        await _redirect(send, f"{COOKIE}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0")


def session_of(headers: dict[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")[:8192]).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _bounded(receive, limit: int):
    """`receive` that refuses a body of over `limit` bytes, whatever its length was said to be."""
    left = limit

    async def read():
        nonlocal left
        message = await receive()
        if message["type"] == "http.request":
            left -= len(message.get("body", b""))
            if left < 0:
                raise Refusal(413, f"a body of over {limit} bytes", "send less at once")
        return message

    return read


async def _body(receive, limit: int) -> bytes:
    read, body = _bounded(receive, limit), b""
    while True:
        message = await read()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def _headed(send, path: str, secure: bool):
    """`send` that adds what keeps a browser from doing more than the page needs."""

    async def write(message) -> None:
        if message["type"] == "http.response.start":
            have = {name.lower() for name, _ in message["headers"]}
            more = [(name, value) for name, value in HEADERS if name not in have]
            style = f" 'sha256-{LOGIN_HASH}'" if message["status"] == 401 else ""
            more.append((b"content-security-policy", POLICY.format(style=style).encode()))
            if b"cache-control" not in have:
                # static files carry an ETag: asked for again each time, sent again only when they are new
                more.append((b"cache-control", b"no-cache" if path.startswith("/static/") else b"no-store"))
            if secure:
                more.append((b"strict-transport-security", b"max-age=31536000"))
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return write


async def _answer(send, refusal: Refusal, page: bool) -> None:
    if page:
        body, kind = LOGIN_PAGE.encode(), b"text/html; charset=utf-8"
    else:
        body = json.dumps({"error": {"message": refusal.message, "fix": refusal.fix}}).encode()
        kind = b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _redirect(send, cookie: str) -> None:
    headers = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
