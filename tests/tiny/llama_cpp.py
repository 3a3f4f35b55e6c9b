"""llama.cpp itself: logits of a .gguf model, with a .gguf LoRA adapter, and its own server (xllamacpp)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


def llama_cpp_logits(model: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """The last token's logits (vocab,); AssertionError where llama.cpp refuses a file."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
    lib.llama_log_set(quiet, ffi.NULL)
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    assert loaded != ffi.NULL, f"llama.cpp does not load {model}"
    try:
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        settings.flash_attn_type = 0
        settings.type_k = settings.type_v = 0  # fp32
        context = lib.llama_init_from_model(loaded, settings)
        if adapter is not None:
            lora = lib.llama_adapter_lora_init(loaded, str(adapter).encode())
            assert lora != ffi.NULL, f"llama.cpp does not load the adapter {adapter}"
            adapters, scales = ffi.new("struct llama_adapter_lora *[1]", [lora]), ffi.new("float[1]", [1.0])
            assert lib.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        tokens = ffi.new("llama_token[]", ids)
        assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))) == 0
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
        values = np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, -1), size * 4), dtype=np.float32).copy()
        lib.llama_free(context)
        return torch.from_numpy(values)
    finally:
        lib.llama_model_free(loaded)
        lib.llama_log_set(ffi.NULL, ffi.NULL)


class OpenModel:
    """A .gguf model that stays open, for many adapters one after the other."""

    def __init__(self, model: Path) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        self._quiet = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
        self.lib.llama_log_set(self._quiet, self.ffi.NULL)
        self.lib.llama_backend_init()
        self._model = self.lib.llama_model_load_from_file(str(model).encode(), self.lib.llama_model_default_params())
        assert self._model != self.ffi.NULL, f"llama.cpp does not load {model}"
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        settings.flash_attn_type = 0
        settings.type_k = settings.type_v = 0  # fp32
        self._context = self.lib.llama_init_from_model(self._model, settings)

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama_free(self._context)
        self.lib.llama_model_free(self._model)
        self.lib.llama_log_set(self.ffi.NULL, self.ffi.NULL)

    def logits(self, ids: list[int], adapter: Path) -> torch.Tensor | None:
        """The last token's logits (vocab,); None where llama.cpp refuses the adapter."""
        lora = self.lib.llama_adapter_lora_init(self._model, str(adapter).encode())
        if lora == self.ffi.NULL:
            return None
        try:
            adapters, scales = self.ffi.new("struct llama_adapter_lora *[1]", [lora]), self.ffi.new("float[1]", [1.0])
            assert self.lib.llama_set_adapters_lora(self._context, adapters, 1, scales) == 0
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self._context), True)
            tokens = self.ffi.new("llama_token[]", ids)
            assert self.lib.llama_decode(self._context, self.lib.llama_batch_get_one(tokens, len(ids))) == 0
            size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self._model))
            raw = self.ffi.buffer(self.lib.llama_get_logits_ith(self._context, -1), size * 4)
            return torch.from_numpy(np.frombuffer(raw, dtype=np.float32).copy())
        finally:
            self.lib.llama_set_adapters_lora(self._context, self.ffi.NULL, 0, self.ffi.NULL)
            self.lib.llama_adapter_lora_free(lora)


LLAMA_SERVER = """
import json, sys
import xllamacpp
given = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = given["model"]
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in given["adapters"]]
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(model: Path, *adapters: Path) -> Iterator[str]:
    """The address of llama.cpp's own server, which is what Ollama starts."""
    given = json.dumps({"model": str(model), "adapters": [str(path) for path in adapters]})
    command = [sys.executable, "-c", LLAMA_SERVER, given]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[1] for line in iter(process.stdout.readline, "") if line.startswith("listening"))
        finally:
            process.kill()
