"""`make quickstart-images` runs from pre-training to pictures; here with drawn pictures and too few steps to learn anything."""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lorakeet.evaluate.report.report import read_report
from structure.tree import ROOT
from tiny.caches import new_cache

sys.path.insert(0, str(ROOT))
demo: Any = import_module("demos.fashion.__main__")


def test_every_caption_is_read_to_its_end() -> None:
    """Words that the tokenizer never saw, such as an unseen kind or look, are letters."""
    from demos.fashion.photos import KINDS, caption
    from demos.fashion.pretrain import LOOKS, TEXT, new_tokenizer

    tokenizer = new_tokenizer()
    told = [caption(kind, look=look) for kind in KINDS for look in (*LOOKS, demo.LOOK)]
    lengths = {text: len(tokenizer(text).input_ids) for text in told}
    assert tokenizer.model_max_length == TEXT["max_position_embeddings"] >= max(lengths.values()), lengths
    assert lengths["a negative photo of a bag"] > lengths["a photo of a coat"]


@pytest.mark.slow
def test_the_demo_runs_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, whose libraries are imported: the command of the Makefile does nothing else."""
    monkeypatch.setenv("LORAKEET_CACHE", str(new_cache(tmp_path / "cache")))
    monkeypatch.chdir(ROOT)
    folders = ["--cache", str(tmp_path / "fashion"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["demos.fashion", "--quick", *folders])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        demo.main()
    for name in ("kind", "look"):
        report = read_report(tmp_path / "out" / name / "report.json")
        assert report.certificate is not None and report.certificate.passed and report.samples is not None
    crossed = json.loads((tmp_path / "out" / "crossed.json").read_text())
    assert list(crossed) == ["kind-held-out", "look-held-out", "both-held-out"]
    assert {"base", "kind", "look", "both", "both against kind", "both against look"} == crossed["both-held-out"].keys()
    assert crossed["kind-held-out"]["kind"].keys() == {"difference", "low", "high", "verdict"}
    seconds = json.loads((tmp_path / "out" / "seconds.json").read_text())
    assert list(seconds) == ["base", "kind", "look", "compared", "drawn"] and min(seconds.values()) > 0
    assert (tmp_path / "out" / "pictures.png").is_file()
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 16
    assert "quickstart-images: install" in (ROOT / "Makefile").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match=r"(?s)^Error: .*nothing in it was touched\. Choose another --out\.$"):
        demo.main()
