"""`studio.safety`: each way in is closed by itself; a test would pass without its guard only if another stood in for it."""

from __future__ import annotations

import asyncio
import stat
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from lorakeet.studio.pages import Studio
from lorakeet.studio.safety import LARGEST_FORM, Guard, token_of

WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "another host name": ({"headers": {"host": "evil.example:8017", "origin": "http://evil.example:8017"}}, 403),
    "another site's page": ({"headers": {"origin": "http://evil.example"}}, 403),
    "another port's page": ({"headers": {"origin": "http://127.0.0.1:9000"}}, 403),
    "no origin": ({"headers": {"origin": ""}}, 403),
    "a wrong csrf token": ({"headers": {"x-csrf": "0" * 64}}, 403),
    "no csrf token": ({"headers": {"x-csrf": ""}}, 403),
    "no cookie": ({"cookies": None}, 401),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_post_needs_host_cookie_origin_and_csrf_token(browser: TestClient, studio: Studio, way: str) -> None:
    """With all of them it is carried out; without any one of them nothing happens."""
    more, status = WAYS[way]
    headers = {name: value for name, value in {**browser.headers, **more.get("headers", {})}.items() if value}
    if "cookies" in more:
        browser.cookies.clear()
    browser.headers.clear()
    assert browser.post("/quickstart", headers=headers).status_code == status
    assert studio.queue.jobs() == []


def test_a_post_with_all_of_them_is_carried_out(browser: TestClient, studio: Studio) -> None:
    assert browser.post("/quickstart").status_code == 303
    assert [job.words[0] for job in studio.queue.jobs()] == ["quickstart"]


def test_a_form_may_have_its_csrf_token_in_a_field(browser: TestClient, studio: Studio) -> None:
    csrf = browser.headers.pop("x-csrf")
    assert browser.post("/quickstart", data={"csrf": "x"}).status_code == 403
    assert browser.post("/quickstart", data={"csrf": csrf}).status_code == 303


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(stranger: TestClient, studio: Studio) -> None:
    assert stranger.get("/").status_code == 401 and stranger.get("/?token=x").status_code == 401
    opened = stranger.get(f"/?a=b&token={studio.token}")
    assert opened.status_code == 200 and 'content="0; url=/?a=b"' in opened.text, "a redirect would come without the cookie"
    assert 'href="/static/icon.svg"' in opened.text, "else the browser looks for one that is not there"
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert studio.token not in opened.headers["set-cookie"], "other ports of this machine get it as well"
    name, _, value = opened.headers["set-cookie"].partition(";")[0].partition("=")
    stranger.cookies.clear()
    for other, status in ((studio.token, 401), (value[:-1], 401), (f"a{value}", 401), (value, 200)):
        assert stranger.get("/", headers={"cookie": f"{name}={other}"}).status_code == status


def test_pages_run_no_inline_script_and_nothing_from_elsewhere(browser: TestClient) -> None:
    page = browser.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["cache-control"] == "no-store"
    assert "style=" not in page.text and "onclick" not in page.text and "http://" not in page.text


def test_only_the_owner_reads_the_token_and_a_restart_keeps_it(studio: Studio) -> None:
    assert stat.S_IMODE(studio.places.own.stat().st_mode) == 0o700
    assert token_of(studio.places.own) == studio.token and len(studio.token) > 40
    (studio.places.own / "token").write_text(43 * "a")  # of an archive of runs
    assert token_of(studio.places.own) == studio.token and token_of(studio.places.runs) != studio.token


def test_a_form_without_end_is_not_read(browser: TestClient) -> None:
    assert browser.post("/quickstart", data={"a": "x" * LARGEST_FORM}).status_code == 413


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)])
def test_other_sites_start_no_work_by_a_link_or_a_picture(browser: TestClient, studio: Studio, site: str, status: int) -> None:
    headers = {"sec-fetch-site": site}
    assert browser.get("/run", headers=headers).status_code == status
    assert browser.get("/static/page.js", headers=headers).status_code == status
    assert browser.get(f"/run?token={studio.token}", headers=headers).status_code == 303, "the printed address, as a link"


def test_the_printed_address_leads_to_no_other_host(stranger: TestClient, studio: Studio) -> None:
    text = stranger.get(f"//evil.example/%22%3E?token={studio.token}").text
    assert "url=//" not in text and '">?' not in text and "evil" not in text.partition("url=")[2].partition("/")[0]


def test_a_form_that_did_not_arrive_whole_is_not_carried_out(studio: Studio) -> None:
    carried_out: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        carried_out.append(scope["path"])

    guard = Guard(app, studio.token)
    pairs = {
        "host": "127.0.0.1", "origin": "http://127.0.0.1", "x-csrf": guard.csrf,
        "cookie": f"{guard.cookie}={guard._session('a')}", "content-type": "application/x-www-form-urlencoded",
    }  # fmt: skip
    headers = [(name.encode(), value.encode()) for name, value in pairs.items()]
    scope = {"type": "http", "method": "POST", "path": "/run", "query_string": b"", "headers": headers}
    messages: list[Message] = [{"type": "http.request", "body": b"out=my", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    assert carried_out == [] and sent[0]["status"] == 400
