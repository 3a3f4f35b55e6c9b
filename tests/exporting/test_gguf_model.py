"""Models in GGUF compute in llama.cpp what they compute here, for every family; metadata, vocabulary, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lorakeet.core.tiled_product import parts
from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.exporting.gguf_layout import ModelLayout, model_layout
from lorakeet.exporting.gguf_model import DIGEST, NAME, write_gguf
from lorakeet.exporting.gguf_vocabulary import BYTE, CONTROL, SPLITS, UNKNOWN, vocabulary_of
from lorakeet.exporting.llama_cpp import LlamaCpp
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.models.text.load import load_tokenizer
from tiny.adapters import random_adapter
from tiny.dense import fold_into
from tiny.models import save_tiny_llama, tiny_model, tiny_tokenizer

TEXT = "<|im_start|>user\nIt's 123 o'clock, né?\n\n  two  spaces<|im_end|>\n<|im_start|>assistant\n"
# ggml looks Gemma's GELU up in a table of half-precision numbers
LIMITS = {"gemma2": 5e-3, "gemma3": 5e-3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.0,
    "beta_fast": 8.0, "beta_slow": 2.0,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    ("llama", {"attention_bias": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"rope_parameters": YARN}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi3", {"tie_word_embeddings": False, "sliding_window": None}),
    ("phi3", {"rope_parameters": PARTIAL, "sliding_window": None}),  # as Phi-4-mini
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_llama_cpp_computes_the_merged_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base", family=family, **changes)
    tokenizer = load_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    adapter = random_adapter(model)
    written = write_gguf(folder, adapter, tmp_path / "model.gguf", tokenizer=tokenizer, quant="f32", facts={DIGEST: "abc"})
    fold_into(model, adapter)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    with LlamaCpp(written.path, context=128) as engine:
        assert engine.tokenise(TEXT) == ids
        torch.testing.assert_close(engine.logits(ids), wanted, atol=LIMITS.get(family, 2e-5), rtol=0)
        assert engine.ends(tokenizer.eos_token_id) and engine.vocabulary == len(tokenizer)
    file = GgufFile(written.path)
    assert file.value(DIGEST) == "abc" and not file.is_adapter and set(file.types) == {"F32"}


@pytest.mark.parametrize(("quant", "limit"), [("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.5)])
def test_narrow_types_differ_by_their_rounding(quant: str, limit: float, tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_folder)
    written = write_gguf(tiny_llama_folder, None, tmp_path / "model.gguf", tokenizer=tokenizer, quant=quant)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder, attn_implementation="eager")
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad(), LlamaCpp(written.path, context=128) as engine:
        difference = float((engine.logits(ids) - model(torch.tensor([ids])).logits[0]).abs().max())
    assert 0 < difference < limit
    stored = dict(GgufFile(written.path).tensors())
    assert torch.equal(stored["output_norm.weight"][:], model.model.norm.weight)  # vectors stay fp32
    narrow = written.types[quant.upper()]
    assert narrow >= 13 and narrow + (written.types.get("F16", 0) if narrow == 13 else 0) == 15 and written.types["F32"] == 5


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0"])
def test_parts_of_a_tensor_are_written_as_the_whole_is(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_llama(tmp_path / "base", tie_word_embeddings=False)
    adapter = random_adapter(transformers.AutoModelForCausalLM.from_pretrained(folder))
    given = {"tokenizer": load_tokenizer(folder), "quant": quant}
    whole = write_gguf(folder, adapter, tmp_path / "whole.gguf", **given).path.read_bytes()
    tensors = {name: rows[:] for name, rows in GgufFile(tmp_path / "whole.gguf").tensors()}
    cut: list[int] = []

    def few(shape: tuple[int, ...]) -> Iterator[slice]:
        yield from (found := list(parts(shape, 999)))
        cut.append(len(found))

    monkeypatch.setattr("lorakeet.exporting.gguf_model.parts", few)
    assert write_gguf(folder, adapter, tmp_path / "parts.gguf", **given).path.read_bytes() == whole and max(cut) > 5
    for name, rows in GgufFile(tmp_path / "parts.gguf").tensors():
        read = torch.cat([rows[part] for part in parts(tuple(rows.shape), 999)])
        assert torch.equal(read, tensors[name]) and read.dtype == rows.dtype


def test_a_width_that_blocks_do_not_divide_is_said_and_kept_wider(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base", intermediate_size=40)
    written = write_gguf(folder, None, tmp_path / "model.gguf", tokenizer=load_tokenizer(folder), quant="q8_0")
    assert written.types["F16"] == 2 and any("2 matrices have a width" in note for note in written.notes)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tiny_llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="never overwritten"):
        write_gguf(tiny_llama_folder, None, out, tokenizer=load_tokenizer(tiny_llama_folder))

    def stop(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(
            tiny_llama_folder, None, tmp_path / "b.gguf", tokenizer=load_tokenizer(tiny_llama_folder), on_progress=stop
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"] and out.read_text() == "mine"
    with pytest.raises(DataError, match="is not a GGUF file"):
        GgufFile(out)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base", family="gemma2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapter = random_adapter(model, "embed_tokens")  # changes the embedding but not the head that shares it
    with pytest.raises(ConfigError, match=r"lm_head\.weight has no name in llama\.cpp's gemma2"):
        write_gguf(folder, adapter, tmp_path / "model.gguf", tokenizer=load_tokenizer(folder))


LLAMA: dict[str, Any] = {
    "model_type": "llama", "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu",
}  # fmt: skip


def test_metadata_of_a_llama() -> None:
    layout = model_layout(LLAMA, "x")
    assert layout.metadata["rope.freq_base"] == 5e5 and layout.metadata["attention.head_count_kv"] == 2
    assert layout.metadata["attention.key_length"] == 8 and not layout.notes and not layout.rope


def change_of(layout: ModelLayout, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    (part,) = layout.parts({name: name}, Problems("x")).values()
    return part.convert


def test_gemma_norms_gain_one() -> None:
    layout = model_layout({**LLAMA, "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}, "x")
    change = change_of(layout, "model.layers.0.self_attn.q_norm.weight")
    assert change is not None and change(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"hidden_act": "relu"}, "The activation is 'relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        (
            {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 99},
            "query_pre_attn_scalar is 99",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_layout({**LLAMA, **changes}, "x")


def test_a_sliding_window_that_llama_cpp_ignores_is_said() -> None:
    layout = model_layout({**LLAMA, "model_type": "mistral", "sliding_window": 16}, "x")
    assert "last 16 tokens" in layout.notes[0]
    assert not model_layout({**LLAMA, "model_type": "mistral", "sliding_window": 64}, "x").notes


def test_phi3_longrope() -> None:
    rope = {"type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    found = model_layout({**LLAMA, "model_type": "phi3", "rope_scaling": rope, "original_max_position_embeddings": 16}, "x")
    assert set(found.rope) == {"rope_factors_long.weight", "rope_factors_short.weight"}
    assert found.metadata["rope.scaling.attn_factor"] == pytest.approx((1 + 0.5) ** 0.5)


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


def test_spaces_that_llama_cpp_cannot_drop_are_said(tmp_path: Path) -> None:
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
