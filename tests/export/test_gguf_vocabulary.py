"""`export.vocabulary`: both kinds of tokenizer, read by llama.cpp as the same ids; what it could not repeat is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lorakeet.errors import ConfigError
from lorakeet.export.gguf_model import NAME, write_gguf
from lorakeet.export.gguf_vocabulary import BYTE, CONTROL, NORMAL, SPLITS, UNKNOWN, UNUSED, vocabulary_of
from lorakeet.export.llama_cpp import LlamaCpp
from lorakeet.formats.files.gguf_file import GgufFile
from tiny.models import tiny_model, tiny_tokenizer

TEXTS = ("This drug worked well", "It's né 日本 🙂", "terrible</s>pain", "a\nb\n\n\tc", "")


def sentencepiece_like() -> Any:
    """BPE with byte fallback, a space put before the text, and a begin token: Llama 2's habits."""
    corpus = ["This▁drug▁worked▁well▁for▁my▁pain", "▁It▁was▁terrible▁the▁side▁effects"] * 3
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learnt = json.loads(core.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in learnt["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_byte_level_bpe() -> None:
    tokenizer = tiny_tokenizer()
    found = vocabulary_of(tokenizer, len(tokenizer) + 3)
    assert (found.model, found.pre, found.add_bos, found.space_prefix) == ("gpt2", "gpt-2", False, False)
    assert found.tokens[-1] == f"[PAD{len(tokenizer) + 2}]" and found.kinds[-3:] == (UNUSED,) * 3
    assert found.kinds[tokenizer.eos_token_id] == CONTROL and found.kinds[10] == NORMAL and not found.scores
    assert found.special["eos"] == tokenizer.eos_token_id
    assert found.chat_template is not None and "generation" not in found.chat_template.replace("add_generation_prompt", "")


def test_llama_cpp_reads_a_sentencepiece_like_tokenizer_the_same(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    model = tiny_model("llama", vocab_size=len(tokenizer) + 2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    found = vocabulary_of(tokenizer, len(tokenizer) + 2)
    assert (found.model, found.add_bos, found.space_prefix) == ("llama", True, True)
    assert (found.kinds[0], found.kinds[1], found.kinds[3]) == (UNKNOWN, CONTROL, BYTE) and not found.merges
    write_gguf(tmp_path / "base", None, tmp_path / "model.gguf", tokenizer=tokenizer, quant="f32")
    with LlamaCpp(tmp_path / "model.gguf", context=64) as engine:
        assert engine.adds_bos and engine.bos == 1
        assert [engine.tokenise(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("pattern", SPLITS)
def test_known_regular_expressions_have_a_name_that_llama_cpp_reads_alike(pattern: str, tmp_path: Path) -> None:
    from tokenizers import Regex

    tokenizer = tiny_tokenizer()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base", None, tmp_path / "model.gguf", tokenizer=tokenizer, quant="f32")
    texts = ("It'S 12345 o'clock", "a  b\n\n c", "Ünïcode 日本!?", "side effects at all.\r\n")
    with LlamaCpp(tmp_path / "model.gguf", context=64) as engine:
        assert [engine.tokenise(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def phi3_like(*, strips: bool = True) -> Any:
    """Llama 2's habits with the special tokens of Phi-3, which swallow the spaces after them."""
    tokenizer = sentencepiece_like()
    marks = [AddedToken(mark, rstrip=strips, special=True) for mark in ("</s>", "<|user|>", "<|end|>", "<|assistant|>")]
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True), *marks], special_tokens=True)
    return tokenizer


def written(folder: Path, family: str, tokenizer: Any, name: str) -> tuple[Path, str]:
    """A file with that general.name asked for, and the notes on it."""
    tiny_model(family, vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(folder / "base")
    found = write_gguf(folder / "base", None, folder / "m.gguf", tokenizer=tokenizer, quant="f32", facts={NAME: name})
    return found.path, " ".join(found.notes)


PHI3_TEXTS = ("<|user|>\n  It worked <|end|>\n<|assistant|>\nwell", "a</s>  b <|endoftext|> c <s> d")


@pytest.mark.parametrize(("name", "kept"), [("reviews", "phi-3-reviews"), ("My-Phi3", "My-Phi3"), ("", "phi-3")])
def test_llama_cpp_drops_the_spaces_that_the_tokenizer_of_phi3_drops(name: str, kept: str, tmp_path: Path) -> None:
    tokenizer = phi3_like()
    file, notes = written(tmp_path, "phi3", tokenizer, name)
    assert GgufFile(file).value(NAME) == kept and ("only by phi-3 in that name" in notes) is (name != kept)
    with LlamaCpp(file, context=64) as engine:
        assert [engine.tokenise(text) for text in PHI3_TEXTS] == [tokenizer.encode(text) for text in PHI3_TEXTS]


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [("llama", tiny_tokenizer), ("llama", phi3_like), ("phi3", lambda: phi3_like(strips=False)), ("phi3", tiny_tokenizer)],
    ids=["without Phi-3's tokens", "another architecture", "no spaces are dropped", "Phi-3 with another vocabulary"],
)
def test_a_name_that_only_says_phi3_does_not_make_llama_cpp_read_it_as_phi3(
    family: str, tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    held = tokenizer()
    file, notes = written(tmp_path, family, held, "my-Phi-3-compare")
    assert GgufFile(file).value(NAME) == "my-Phi_3-compare" and "by 'my-Phi-3-compare' llama.cpp would read it as Phi-3" in notes
    texts = ("a</s>pain", "<|im_start|> a") if family == "llama" and held.bos_token == "<s>" else PHI3_TEXTS
    with LlamaCpp(file, context=64) as engine:
        assert [engine.tokenise(text) for text in texts] == [held.encode(text) for text in texts]


def test_spaces_that_llama_cpp_cannot_be_told_to_drop_are_said(tmp_path: Path) -> None:
    """Phi-4-mini: Phi-3's architecture and habits, without the tokens that llama.cpp then looks up."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", rstrip=True, special=True)], special_tokens=True)
    file, notes = written(tmp_path, "phi3", tokenizer, "phi-3-mine")
    assert GgufFile(file).value(NAME) == "phi_3-mine" and "drops spaces after <|user|>; llama.cpp keeps them" in notes
    LlamaCpp(file, context=64).close()
    assert "drops spaces after </s>, <|user|>" in written(tmp_path / "llama", "llama", phi3_like(), "mine")[1]


def test_what_llama_cpp_could_not_repeat_is_refused() -> None:
    odd = tiny_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match=r"as no known pre-tokenizer of llama\.cpp"):
        vocabulary_of(odd, len(odd))
    lowered = tiny_tokenizer()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="normalises texts before splitting"):
        vocabulary_of(lowered, len(lowered))
    with pytest.raises(ConfigError, match="is it the tokenizer of this model"):
        vocabulary_of(tiny_tokenizer(), 5)
    with pytest.raises(ConfigError, match=r"without a tokenizer\.json"):
        vocabulary_of(object(), 5)
