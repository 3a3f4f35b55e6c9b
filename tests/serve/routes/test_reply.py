"""Replies are plain values."""

from __future__ import annotations

import json

from lorakeet.serve.routes.reply import as_json


def test_json_keeps_letters() -> None:
    reply = as_json({"text": "日本", "n": [1, None]})
    assert json.loads(str(reply.body)) == {"text": "日本", "n": [1, None]} and "日本" in str(reply.body)
    assert (reply.status, reply.media) == (200, "application/json")
