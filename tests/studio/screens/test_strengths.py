"""`studio.screens.strengths`: the page of an image run, and its slider."""

from __future__ import annotations

import json
from pathlib import Path

from starlette.testclient import TestClient

from lorakeet.studio.pages import Studio
from tiny.command_results import failed


def test_an_image_run_is_tried_by_drawing(browser: TestClient, studio: Studio) -> None:
    folder = studio.places.runs / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: m\ndata: r\nkind: image\ndiffusion: {prompts: ['a <b>red</b> box']}\n")
    address = browser.post("/try/open", data={"run": "mine"}).headers["location"]
    assert address == "/try/strengths/mine" and 'value="a &lt;b&gt;red&lt;/b&gt; box"' in browser.get(address).text
    refused = browser.post(address, data={"prompt": "<i>x</i>", "seed": "?"})
    assert refused.status_code == 400 and "expected whole numbers" in refused.text and "&lt;i&gt;x&lt;/i&gt;" in refused.text
    assert browser.post(address, data={"prompt": "a box", "seed": "1", "steps": "2"}).status_code == 303
    assert "Waits in the queue" in browser.get(address).text
    [job] = studio.queue.jobs()
    out = Path(job.words[job.words.index("--out") + 1])
    out.mkdir(parents=True)
    (out / "pictures.json").write_text(json.dumps([{"file": f"00{n}.png", "mix": {"it": n / 2} if n else {}} for n in range(4)]))
    (out / "001.png").write_bytes(b"\x89PNG")
    text = browser.get(address).text
    assert 'data-strength="1.5"' in text and 'max="3" step="1" value="1"' in text
    for name, said in (("alive", ""), ("code", "3"), ("result", failed("x", "content-differs-from-certificate"))):
        (job.folder / name).write_text(said)
    assert "Draw it uncertified" in browser.get(address).text
    assert browser.post(address, data={"uncertified": "true"}).status_code == 303
    assert studio.queue.jobs()[-1].words == (*job.words, "--uncertified")
    picture = browser.get(f"{address.replace('mine', job.name)}/001.png")
    assert picture.content == b"\x89PNG" and picture.headers["content-type"] == "image/png"
    assert browser.get(f"/try/strengths/{job.name}/pictures.json").status_code == 404
