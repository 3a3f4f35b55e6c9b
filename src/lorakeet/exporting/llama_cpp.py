"""llama.cpp in this process, through the package llama-cpp-py-sync: its own quantiser, tokenizer and logits.

Ollama and LM Studio run it, so exports are evaluated with it. The KV cache is fp32 and there is no flash attention, so that
remaining differences come from the file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakeet.errors import ConfigError, EnvironmentProblem, PackageMissing
from lorakeet.memory.mapped_files import releasing_pages

FILE_TYPES = {  # llama_ftype of llama.h
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
}  # fmt: skip
_F32 = 0  # ggml_type
_CELLS = 256  # a context is a multiple of so many tokens
PASS = 256  # tokens computed at once, for which logits and the attention scores of all heads are in memory
_ERRORS = 4  # ggml_log_level from which llama.cpp's lines are kept for a message


class ModelRefused(ConfigError):
    """llama.cpp does not load a file."""


def is_installed() -> bool:
    """True if llama.cpp can be used here."""
    return importlib.util.find_spec("llama_cpp_py_sync") is not None


class _Library:
    """The loaded library with its log kept instead of printed."""

    def __init__(self) -> None:
        if not is_installed():
            raise PackageMissing("This needs llama.cpp, which is not installed", "lorakeet[llama]")
        from llama_cpp_py_sync import _cffi_bindings

        bindings: Any = _cffi_bindings
        self.ffi, self.lib = bindings.get_ffi(), bindings.get_lib()
        self.said: list[str] = []
        self.log = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", self._note)
        self.lib.llama_backend_init()

    def _note(self, level: int, text: Any, _: Any) -> None:
        if level == _ERRORS:
            self.said.append(self.ffi.string(text).decode("utf-8", "replace").strip())

    def reason(self) -> str:
        """The last errors that llama.cpp has logged, as one line."""
        lines = [line for line in self.said if line][-3:]
        self.said.clear()
        return "; ".join(lines) or "it gives no reason"


_loaded: list[_Library] = []


def _library() -> _Library:
    if not _loaded:
        _loaded.append(_Library())
    library = _loaded[0]
    library.lib.llama_log_set(library.log, library.ffi.NULL)  # another user of llama.cpp may have redirected it
    return library


def quantise(source: Path, out: Path, quant: str, *, threads: int = 1) -> None:
    """Writes `source`, a GGUF file in f32, f16 or bf16, to `out` in the mixture of types that llama.cpp calls `quant`.

    llama.cpp maps `source` and reads it tensor by tensor; pages that it has read are released meanwhile.
    """
    library = _library()
    params = library.lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[quant]
    params.nthread = threads
    pointer = library.ffi.new("llama_model_quantize_params *", params)
    with releasing_pages(source):
        failed = library.lib.llama_model_quantize(str(source).encode(), str(out).encode(), pointer)
    if failed:
        out.unlink(missing_ok=True)
        raise EnvironmentProblem(f"llama.cpp could not quantise {source.name} to {quant}: {library.reason()}.")


def context_bytes(config: Any, context: int) -> int:
    """Bytes that llama.cpp takes beside the pages of its file, for a transformers text config.

    The KV cache in fp32, and for one pass over at most PASS tokens the scores of all heads, the widest activations and two
    copies of the logits.
    """
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    kept = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    cells = -(-context // _CELLS) * _CELLS
    cache = 2 * cells * kept * width * int(config.num_hidden_layers)
    passed, vocabulary = min(context, PASS), int(config.vocab_size)
    return 4 * (cache + passed * (2 * heads * cells + 4 * hidden + 3 * inner + 2 * vocabulary))


class LlamaCpp:
    """One GGUF model in llama.cpp, with at most one LoRA adapter on it. Close it, or use it in a `with` block."""

    def __init__(
        self, model: Path, *, adapter: Path | None = None, context: int = 2048, threads: int = 1, repack: bool = True
    ) -> None:
        """ModelRefused, with llama.cpp's reason, if it does not load the model or the adapter.

        Without `repack` it makes no copies of weights in another layout: they stay the pages of the file.
        """
        self._library = _library()
        self._ffi, self._lib = self._library.ffi, self._library.lib
        self._model = self._context = self._ffi.NULL
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, repack
        self._model = self._lib.llama_model_load_from_file(str(model).encode(), params)
        if self._model == self._ffi.NULL:
            raise ModelRefused(f"llama.cpp cannot load {model}: {self._library.reason()}.")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.length = context
        params.n_batch = params.n_ubatch = min(context, PASS)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = _F32
        params.flash_attn_type = 0
        params.n_seq_max = 1
        params.no_perf = True
        self._context = self._lib.llama_init_from_model(self._model, params)
        if self._context == self._ffi.NULL:
            reason = self._library.reason()
            self.close()
            raise ConfigError(f"llama.cpp cannot allocate a context of {context} tokens: {reason}.")
        if adapter is not None:
            lora = self._lib.llama_adapter_lora_init(self._model, str(adapter).encode())
            if lora == self._ffi.NULL:
                reason = self._library.reason()
                self.close()
                raise ModelRefused(f"llama.cpp cannot load the adapter {adapter}: {reason}.")
            adapters, scales = self._ffi.new("struct llama_adapter_lora *[1]", [lora]), self._ffi.new("float[1]", [1.0])
            self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales)

    def tokenise(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of `text`, with special tokens recognised in it; with `add_special` also those that the file's settings add."""
        raw = text.encode("utf-8")
        most = len(raw) + 8
        buffer = self._ffi.new("llama_token[]", most)
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), buffer, most, add_special, True)
        return [int(buffer[place]) for place in range(count)]

    def logits(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        """The logits after each of `ids`, or of the `last` ones, (tokens, vocabulary) fp32, with an empty context before."""
        return torch.cat(list(self.logit_parts(ids, last)))

    def greedy(self, prompt: Sequence[int], tokens: int, ends: frozenset[int]) -> list[int]:
        """The greedy continuation of `prompt`, up to `tokens` tokens or one of `ends` (included)."""
        written: list[int] = []
        last = self.logits(prompt, 1)
        while len(written) < tokens:
            written.append(int(last[-1].argmax()))
            if written[-1] in ends:
                break
            last = self._decode(written[-1:], len(prompt) + len(written) - 1, 1)
        return written

    def logit_parts(self, ids: Sequence[int], last: int | None = None) -> Iterator[Tensor]:
        """Yields the logits that `logits` returns, at most PASS of them at a time; any other call meanwhile ends it."""
        last = len(ids) if last is None else last
        self._require_context(len(ids))
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for start in range(0, len(ids), PASS):
            part = ids[start : start + PASS]
            wanted = max(0, min(len(part), start + len(part) - (len(ids) - last)))
            if wanted:
                yield self._decode(part, start, wanted)  # unnamed: a name would keep it in memory during the next pass
            else:
                self._decode(part, start, wanted)

    def _require_context(self, tokens: int) -> None:
        if tokens > self.length:
            raise ConfigError(f"{tokens} tokens do not fit into llama.cpp's context of {self.length} tokens.")

    def _decode(self, ids: Sequence[int], start: int, wanted: int) -> Tensor:
        """Computes at most PASS further `ids`; returns the logits (wanted, vocabulary) of the last ones."""
        self._require_context(start + len(ids))
        with self._batch(ids, start, wanted) as batch:
            if self._lib.llama_decode(self._context, batch):
                raise EnvironmentProblem(f"llama.cpp could not compute {len(ids)} tokens: {self._library.reason()}.")
        if not wanted:
            return torch.empty(0, self.vocabulary)
        raw = self._ffi.buffer(self._lib.llama_get_logits(self._context), wanted * self.vocabulary * 4)
        return torch.from_numpy(np.frombuffer(raw, np.float32).reshape(wanted, self.vocabulary).copy())

    @contextmanager
    def _batch(self, ids: Sequence[int], start: int, wanted: int) -> Iterator[Any]:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, number in enumerate(ids):
                batch.token[place], batch.pos[place] = int(number), start + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = place >= len(ids) - wanted
            yield batch
        finally:
            self._lib.llama_batch_free(batch)

    @property
    def vocabulary(self) -> int:
        """The size of the vocabulary."""
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    @property
    def bos(self) -> int:
        """The id of the begin token; -1 if there is none."""
        return int(self._lib.llama_vocab_bos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """True if llama.cpp puts the begin token before a prompt."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    def ends(self, number: int) -> bool:
        """True if llama.cpp stops after this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, number))

    def close(self) -> None:
        """Frees the model and its context."""
        if self._context != self._ffi.NULL:
            self._lib.llama_free(self._context)
            self._context = self._ffi.NULL
        if self._model != self._ffi.NULL:
            self._lib.llama_model_free(self._model)
            self._model = self._ffi.NULL

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
