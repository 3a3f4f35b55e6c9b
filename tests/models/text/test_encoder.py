"""Sentence encoders: pooled and scaled as their folders say, whatever else is in the batch; folders that are none are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from lorakeet.errors import ConfigError, DataError
from lorakeet.models.text.encoder import require_encoder, text_embedder

TEXTS = ["a good film", "bad", "a film that was good and then bad and then good again", "bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random encoder with the words of TEXTS."""
    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(" ".join(TEXTS).split())]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


def states_of(folder: Path, text: str) -> torch.Tensor:
    """The last hidden states (tokens, width) of one text alone, by transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=16)).last_hidden_state[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["", "mean", "cls"])
def test_vectors_are_pooled_as_the_folder_says_and_have_length_one(folder: Path, mode: str, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if mode:
        (tmp_path / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{name}": f"{mode}_" in f"{name}_" for name in ("mean_tokens", "cls_token", "max_tokens")}
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    found = text_embedder(require_encoder(tmp_path))(TEXTS)
    assert found.shape == (4, 16) and found.dtype == np.float64
    for text, vector in zip(TEXTS, found, strict=True):
        states = states_of(folder, text)
        pooled = states[0] if mode == "cls" else states.mean(0)
        assert vector == pytest.approx((pooled / pooled.norm()).double().numpy(), abs=1e-5)


def test_what_is_no_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json; expected the folder of a text encoder"):
        require_encoder(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="pools by pooling_mode_max_tokens; expected one of pooling_mode_mean_tokens"):
        require_encoder(tmp_path)


def test_code_of_the_folder_never_runs(tmp_path: Path) -> None:
    own = {"model_type": "strange", "auto_map": {"AutoModel": "strange.Model", "AutoConfig": "strange.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "strange.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(DataError, match="Code of a folder is never run"):
        text_embedder(require_encoder(tmp_path))
