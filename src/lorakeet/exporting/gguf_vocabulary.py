"""A tokenizer as GGUF keeps it: tokens by id with kinds, scores or merges, the name of the pre-tokenizer, special ids.

Two kinds are written: byte-level BPE ("gpt2" in GGUF) and SentencePiece-like BPE with byte fallback ("llama"). For the first, the
pre-tokenizer is named by the regular expression that splits a text before merging. In the second, llama.cpp merges the neighbours
whose union has the highest score; so scores are the negated ranks of the merges, which gives the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakeet.data.template import encoded
from lorakeet.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NO_MERGE = -1e6  # the score of a token that is no merge
_MARKERS = re.compile(r"\{%-?\s*(generation|endgeneration)\s*-?%\}")  # for training masks only; unknown to other engines
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _SHORTENED +
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _SHORTENED +
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PHI3_NAME = re.compile("(phi)-?(3)", re.IGNORECASE)
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")  # which llama.cpp requires under such a name
# The regular expression of a Split before ByteLevel → llama.cpp's name of it.
SPLITS: dict[str, str] = {
    _LLAMA3: "llama-bpe", _QWEN2: "qwen2", _QWEN35: "qwen35", _TEKKEN: "tekken", _GPT_4O: "gpt-4o",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """The content of tokenizer.ggml.* of a GGUF file; `special` are ids by key (bos, eos, unknown, padding)."""

    model: str  # gpt2 or llama
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]  # empty for gpt2
    merges: tuple[str, ...]  # empty for llama
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    chat_template: str | None
    strips: tuple[str, ...] = ()  # tokens after which the tokenizer drops spaces


def vocabulary_of(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer, padded with unused tokens to the `rows` of the embedding.

    ConfigError for a slow tokenizer, or one that llama.cpp cannot reproduce.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"The tokenizer is a {type(tokenizer).__name__} without a tokenizer.json; save one (save_pretrained).")
    core = json.loads(backend.to_str())
    model = core["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"The tokenizer is of type {model.get('type')}; only BPE can be written to GGUF here.")
    by_id: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(by_id, NORMAL)
    for added in core.get("added_tokens", []):
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    count = max(rows, max(by_id) + 1)
    if count > rows:
        raise ConfigError(f"The tokenizer has {count} tokens and the embedding {rows} rows; is it the tokenizer of this model?")
    merges = tuple(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    first = encoded(tokenizer, "a", add_special_tokens=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    byte_level = not model.get("byte_fallback")
    tokens = tuple(by_id.get(number, f"[PAD{number}]") for number in range(count))
    scores: dict[str, float] = {}
    if not byte_level:
        for rank, merge in enumerate(merges):
            scores.setdefault(merge.replace(" ", "", 1), -float(rank))
        kinds |= {number: BYTE for number, token in by_id.items() if _BYTE_TOKEN.fullmatch(token)}
        kinds |= {number: UNKNOWN for number, token in by_id.items() if token == model.get("unk_token")}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    special = {"bos": bos, "eos": eos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=_pre_tokenizer(core) if byte_level else "default",
        tokens=tokens,
        kinds=tuple(kinds.get(number, UNUSED) for number in range(count)),
        scores=() if byte_level else tuple(scores.get(token, _NO_MERGE) for token in tokens),
        merges=merges if byte_level else (),
        special={key: int(value) for key, value in special.items() if value is not None},
        add_bos=bos is not None and first[:1] == [bos],
        add_eos=eos is not None and len(first) > 1 and first[-1] == eos,
        space_prefix=_space_prefix(core),
        chat_template=_MARKERS.sub("", template) if isinstance(template, str) else None,
        strips=tuple(added["content"] for added in core.get("added_tokens", []) if added.get("rstrip")),
    )


def name_for_llama_cpp(name: str, architecture: str, vocabulary: Vocabulary) -> tuple[str, str]:
    """The general.name under which llama.cpp reads the vocabulary correctly, and why it is not `name` (else empty).

    Only for "phi-3" or "phi3" in that name llama.cpp drops the spaces after special tokens; such a file does not load unless it
    has four tokens of Phi-3.
    """
    if architecture == "phi3" and vocabulary.strips and set(_PHI3_TOKENS) <= set(vocabulary.tokens):
        if _PHI3_NAME.search(name):
            return name, ""
        new = f"phi-3-{name}" if name else "phi-3"
        why = "only by phi-3 in that name llama.cpp drops the spaces after special tokens, as this tokenizer does"
        return new, f"The file's general.name is '{new}': {why}."
    new = _PHI3_NAME.sub(r"\1_\2", name)
    said = [f"The file's general.name is '{new}': by '{name}' llama.cpp would read it as Phi-3."] if new != name else []
    if vocabulary.strips:
        shown = ", ".join(vocabulary.strips[:4])
        said.append(f"The tokenizer drops spaces after {shown}; llama.cpp keeps them in this model, so put none there.")
    return new, " ".join(said)


def _pre_tokenizer(core: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. ConfigError if no known one splits texts in the same way."""
    steps = _steps(core.get("pre_tokenizer"))
    names = [step["type"] for step in steps]
    if core.get("normalizer") and [step["type"] for step in _steps(core["normalizer"])] != ["NFC"]:
        raise ConfigError(f"The tokenizer normalises texts before splitting ({core['normalizer']}), which GGUF cannot store.")
    if names == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if names == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    splits = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if names == ["Split", "ByteLevel"] and splits[0] in SPLITS:
        return SPLITS[splits[0]]
    raise ConfigError(
        f"The tokenizer splits texts by {json.dumps(steps, ensure_ascii=False)[:300]}, as no known pre-tokenizer of llama.cpp "
        f"does (gpt-2, smollm, {', '.join(SPLITS.values())}); the file would read prompts in other tokens."
    )


def _steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part.get("pretokenizers") or part.get("normalizers") or [dict(part)])


def _space_prefix(core: Mapping[str, Any]) -> bool:
    """True if a space is put before a text, as SentencePiece does by default."""
    metaspace = [step for step in _steps(core.get("pre_tokenizer")) if step["type"] == "Metaspace"]
    if metaspace:
        return bool(metaspace[0].get("prepend_scheme", "always") != "never")
    return any(step["type"] == "Prepend" for step in _steps(core.get("normalizer")))
