"""Who may use the studio: this machine's browser that was given the token, from the studio's own pages alone.

    Host     a loopback name                        against names that were pointed at this machine (DNS rebinding)
    token    in the printed address, then a cookie  HttpOnly, SameSite=Strict
    Origin   of every POST is that of the page      against pages of other sites
    site     Sec-Fetch-Site of every request        against links and pictures of other sites that start work
    csrf     a field or header of every POST        against what the two above may miss

Every answer forbids inline scripts, other sites' frames and all that is not served from here.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakeet.studio.places import signature_of

HOSTS = ("127.0.0.1", "localhost", "::1")
LARGEST_FORM = 1 << 20  # bytes of a posted form
LARGEST_UPLOAD = 1 << 30  # bytes of uploaded rows
FORM = "studio.form"  # where a request's scope has the fields of a posted form
SAFE = ("GET", "HEAD")
_OWN_SITES = ("same-origin", "none")  # Sec-Fetch-Site of a page of the studio, and of an address that was typed
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def token_of(own: Path) -> str:
    """The token of the studios on one folder: open pages go on after a restart. No file of that folder tells it."""
    own.mkdir(parents=True, exist_ok=True)
    own.chmod(0o700)
    return signature_of(f"token {own.resolve()}")


def csrf_of(token: str) -> str:
    """What every form and request that changes something repeats; it tells nothing of the token."""
    return hmac.new(token.encode(), b"csrf", hashlib.sha256).hexdigest()


class Guard:
    """An ASGI application that lets through to `app` what is permitted, with the fields of posted forms in its scope."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token, self.csrf = app, token, csrf_of(token)
        self.cookie = f"lorakeet-{hashlib.sha256(token.encode()).hexdigest()[:8]}"  # other studios have others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        guarded = _with_headers(send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused is None and scope["method"] not in SAFE:
            refused, receive = await self._posted(scope, headers, receive)
        await (refused or self.app)(scope, receive, guarded)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        host = headers.get("host", "")
        if _name(host) not in HOSTS:
            return PlainTextResponse(f"This is no name of this machine: {host[:100]}. Open the studio as 127.0.0.1.", 403)
        if scope["method"] in SAFE and (landed := self._landed(scope, headers)) is not None:
            return landed
        if headers.get("sec-fetch-site", "none") not in _OWN_SITES:
            return PlainTextResponse("Pages of other sites may open nothing here. Type the address in a new tab.", 403)
        if scope["path"].startswith("/static/") and scope["method"] in SAFE:
            return None
        if not self._knows(headers):
            return _closed()
        if scope["method"] not in SAFE:
            origin = headers.get("origin", "")
            if _place(origin) != host or not origin:
                return PlainTextResponse(f"Pages of {origin[:100] or 'an unknown origin'} may change nothing here.", 403)
        return None

    def _landed(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """The answer to an address with a token; None to one without."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is None:
            return None
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return _closed()
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        where = "/" + quote(scope["path"]).lstrip("/") + (f"?{rest}" if rest else "")  # two slashes would name a host
        if self._knows(headers):
            return RedirectResponse(where, 303)
        welcome = _welcome(where)
        welcome.set_cookie(self.cookie, self._session(secrets.token_urlsafe(16)), httponly=True, samesite="strict", path="/")
        return welcome

    def _knows(self, headers: Mapping[str, str]) -> bool:
        """True if the browser has opened the address with the token before."""
        given = _cookies(headers).get(self.cookie, "")
        return hmac.compare_digest(given.encode(), self._session(given.partition(".")[0]).encode())

    def _session(self, chance: str) -> str:
        """The cookie of a browser: other ports of this machine get it too, so the token cannot be computed from it."""
        return f"{chance}.{hmac.new(self.token.encode(), f'session {chance}'.encode(), hashlib.sha256).hexdigest()}"

    async def _posted(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> tuple[Response | None, Receive]:
        """A refusal, or the form's fields in the scope; the body of anything else is left to its handler."""
        given = headers.get("x-csrf", "")
        if headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            body, more = bytearray(), True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return PlainTextResponse("The form did not arrive whole. Send it again.", 400), receive
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > LARGEST_FORM:
                    return PlainTextResponse(f"The form has more than {LARGEST_FORM:,} bytes.", 413), receive
            fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
            scope[FORM] = {name: values[-1] for name, values in fields.items()}
            given = given or scope[FORM].pop("csrf", "")
        if not hmac.compare_digest(given.encode(), self.csrf.encode()):
            said = "This form is not of this studio, or it is old. Reload the page and send it again."
            return PlainTextResponse(said, 403), receive
        return None, receive


def _welcome(path: str) -> Response:
    """A page that goes on to `path`: after a link on another page, a redirect would not have the new cookie."""
    where = html.escape(path)
    return HTMLResponse(
        f'<!doctype html><html lang="en"><title>Lorakeet studio</title><link rel="icon" href="/static/icon.svg">'
        f'<meta http-equiv="refresh" content="0; url={where}">'
        f'<p><a href="{where}">Open the studio</a></p></html>'
    )


def _closed() -> Response:
    said = "The studio is closed to this browser. Open the whole address that `lorakeet studio` printed, with its token."
    return PlainTextResponse(said, 401)


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookies(headers: Mapping[str, str]) -> dict[str, str]:
    """By name; whatever other programs of this machine have put beside ours is no reason to refuse it."""
    parts = (part.partition("=") for part in headers.get("cookie", "").split(";"))
    return {name.strip(): value.strip() for name, _, value in parts}


def _with_headers(send: Send) -> Any:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in own]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sent
