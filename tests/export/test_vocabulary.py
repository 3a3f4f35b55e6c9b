"""`export.vocabulary`: both kinds of tokenizer, read by llama.cpp as the same ids; what it could not repeat is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lorakeet.errors import ConfigError
from lorakeet.export.gguf_model import write_gguf
from lorakeet.export.llama_cpp import LlamaCpp
from lorakeet.export.vocabulary import BYTE, CONTROL, NORMAL, SPLITS, UNKNOWN, UNUSED, vocabulary_of
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


def test_what_llama_cpp_could_not_repeat_is_refused() -> None:
    odd = tiny_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match=r"no pre-tokenizer of llama\.cpp"):
        vocabulary_of(odd, len(odd))
    lowered = tiny_tokenizer()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="changes texts before it cuts them"):
        vocabulary_of(lowered, len(lowered))
    with pytest.raises(ConfigError, match="is it the tokenizer of this model"):
        vocabulary_of(tiny_tokenizer(), 5)
    with pytest.raises(ConfigError, match=r"without a tokenizer\.json"):
        vocabulary_of(object(), 5)
