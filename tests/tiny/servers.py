"""Servers that answer as llama.cpp, vLLM, SGLang, OpenAI and Ollama describe their APIs, and refuse what these do not know."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lorakeet.exporting.llama_cpp import LlamaCpp

MODEL = "tiny"
KINDS = ("llama.cpp", "vLLM", "SGLang", "OpenAI", "Ollama")
# What SGLang 0.5.23's /generate is sent here, of the fields of its GenerateReqInput.
SGLANG_FIELDS = {"input_ids", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num"}
SGLANG_FIELDS |= {"return_text_in_logprobs", "lora_path"}


class Fake(BaseHTTPRequestHandler):
    """One request; `engine` computes, `tokenizer` renders conversations, `kind` is one of KINDS."""

    engine: LlamaCpp
    tokenizer: Any
    kind: str
    logprobs = True  # an Ollama of before 0.12.11 tells none
    form = "F16"  # the number format, where the server tells it
    adapters: tuple[str, ...] = ()  # in SGLang, beside its base
    lock = threading.Lock()

    def do_GET(self) -> None:
        models = {"/v1/models": {"data": [{"id": MODEL, "owned_by": "someone"}]}}
        known: dict[str, dict[str, Any]] = {
            "llama.cpp": {
                "/props": {"model_path": "/models/tiny.gguf", "build_info": "b7", "model_ftype": self.form}, **models,
            },
            "vLLM": {"/version": {"version": "0.11.0"}, **models},
            "SGLang": {
                "/model_info": {"model_path": "/models/tiny", "served_model_name": MODEL, "is_generation": True},
                "/server_info": {"version": "0.5.23", "dtype": "float16", "quantization": None},
                "/v1/models": {"data": [
                    {"id": MODEL, "owned_by": "sglang", "root": MODEL},
                    *({"id": name, "owned_by": "sglang", "root": f"/{name}", "parent": MODEL} for name in self.adapters),
                ]},
            },
            "OpenAI": models,
            "Ollama": {
                "/api/version": {"version": "0.12.11"},
                "/api/tags": {"models": [{"name": f"{MODEL}:latest", "digest": "0123456789abcdef"}]},
                **models,
            },
        }
        self._say(known[self.kind].get(self.path))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = {
            "llama.cpp": {"/tokenize": self.tokenize, "/apply-template": self.template, "/completion": self.completion},
            "vLLM": {"/tokenize": self.vllm_tokenize, "/v1/completions": self.completions},
            "SGLang": {
                "/tokenize": self.vllm_tokenize, "/generate": self.generate, "/load_lora_adapter": self.load_sglang_adapter,
            },
            "OpenAI": {"/v1/completions": self.completions, "/v1/chat/completions": self.chat_completions},
            "Ollama": {"/api/chat": self.ollama_chat, "/api/show": self.ollama_show},
        }  # fmt: skip
        answer = answers[self.kind].get(self.path)
        with self.lock:
            self._say(answer(asked) if answer else None)

    def tokenize(self, asked: Any) -> dict[str, Any]:
        assert set(asked) == {"content", "add_special", "parse_special"}
        return {"tokens": self.engine.tokenise(asked["content"])}

    def template(self, asked: Any) -> dict[str, Any]:
        return {"prompt": self._rendered(asked["messages"])}

    def completion(self, asked: Any) -> dict[str, Any]:
        assert set(asked) == {"prompt", "n_predict", "temperature", "n_probs", "cache_prompt"} and not asked["cache_prompt"]
        steps = self._write(asked["prompt"], asked["n_predict"], asked["n_probs"])
        probabilities = [{**self._entry(step), "id": step[0][0], "top_logprobs": [
            {**self._entry([one]), "id": one[0]} for one in step[1:]]} for step in steps]  # fmt: skip
        return {"content": self._text(steps), "completion_probabilities": probabilities}

    def vllm_tokenize(self, asked: Any) -> dict[str, Any]:
        assert asked["model"] == MODEL
        text = asked["prompt"] if "prompt" in asked else self._rendered(asked["messages"])
        ids = self.engine.tokenise(text)
        return {"count": len(ids), "max_model_len": 512, "tokens": ids}

    def completions(self, asked: Any) -> dict[str, Any]:
        assert asked["model"] == MODEL and asked["temperature"] == 0
        by_id = asked.pop("return_tokens_as_token_ids", False)
        along = asked.pop("prompt_logprobs", 0)
        assert self.kind == "vLLM" or not (by_id or along)
        assert set(asked) <= {"model", "prompt", "max_tokens", "temperature", "logprobs"}
        steps = self._write(asked["prompt"], asked["max_tokens"], asked.get("logprobs") or 0)
        name = (lambda number: f"token_id:{number}") if by_id else self._token
        told = {
            "tokens": [name(step[0][0]) for step in steps],
            "token_logprobs": [step[0][1] for step in steps],
            "top_logprobs": [{name(number): value for number, value in step[1:]} for step in steps],
        }
        choice = {"text": self._text(steps), "logprobs": told if "logprobs" in asked else None}
        if along:
            choice["prompt_logprobs"] = [None, *(
                {str(number): {"logprob": value, "rank": 1, "decoded_token": self._token(number)} for number, value in top}
                for top in (self._top(row, along) for row in self.engine.logits(asked["prompt"])[:-1].log_softmax(-1))
            )]  # fmt: skip
        return {"choices": [choice], "usage": {"prompt_tokens": len(asked["prompt"])}}

    def generate(self, asked: Any) -> dict[str, Any] | int:
        assert set(asked) <= SGLANG_FIELDS and set(asked["sampling_params"]) == {"max_new_tokens", "temperature"}
        if asked.get("lora_path", "") not in ("", *self.adapters):
            return 400
        top, ids = asked.get("top_logprobs_num", 0), asked["input_ids"]
        steps = self._write(ids, asked["sampling_params"]["max_new_tokens"], top)
        meta: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": len(steps)}
        if asked.get("return_logprob"):
            assert asked["return_text_in_logprobs"] and top
            meta["output_token_logprobs"] = [self._triple(*step[0]) for step in steps]
            meta["output_top_logprobs"] = [[self._triple(*one) for one in step[1:]] for step in steps]
            if asked["logprob_start_len"] == 0:
                tables = self.engine.logits(ids)[:-1].log_softmax(-1)
                meta["input_token_logprobs"] = [[None, ids[0], self._token(ids[0])], *(
                    self._triple(number, float(row[number])) for number, row in zip(ids[1:], tables, strict=True)
                )]  # fmt: skip
                meta["input_top_logprobs"] = [None, *([self._triple(*one) for one in self._top(row, top)] for row in tables)]
        return {"text": self._text(steps), "output_ids": [step[0][0] for step in steps], "meta_info": meta}

    def load_sglang_adapter(self, asked: Any) -> dict[str, Any]:
        assert set(asked) == {"lora_name", "lora_path"}
        type(self).adapters = (*self.adapters, asked["lora_name"])
        return {"success": True, "error_message": "", "loaded_adapters": {name: f"/{name}" for name in self.adapters}}

    def _triple(self, number: int, logprob: float) -> list[Any]:
        return [logprob, number, self._token(number)]

    def chat_completions(self, asked: Any) -> dict[str, Any]:
        ids = self.engine.tokenise(self._rendered(asked["messages"]))
        steps = self._write(ids, asked["max_tokens"], asked.get("top_logprobs", 0))
        message = {"role": "assistant", "content": self._text(steps)}
        return {"choices": [{"message": message}], "usage": {"prompt_tokens": len(ids)}}

    def ollama_chat(self, asked: Any) -> dict[str, Any]:
        assert set(asked) == {"model", "messages", "stream", "options", "logprobs", "top_logprobs"} and asked["stream"] is False
        options = asked["options"]
        assert options["temperature"] == 0 and options["repeat_penalty"] == 1.0
        ids = self.engine.tokenise(self._rendered(asked["messages"]))
        steps = self._write(ids, options["num_predict"], asked["top_logprobs"])
        told = [{**self._entry(step), "top_logprobs": [self._entry([one]) for one in step[1:]]} for step in steps]
        answer = {"message": {"role": "assistant", "content": self._text(steps)}, "prompt_eval_count": len(ids), "done": True}
        return {**answer, "logprobs": told} if self.logprobs else answer

    def ollama_show(self, asked: Any) -> dict[str, Any]:
        assert asked == {"model": MODEL}
        return {"details": {"format": "gguf", "quantization_level": self.form}}

    def _rendered(self, messages: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _token(self, number: int) -> str:
        return str(self.tokenizer.decode([number]))

    def _entry(self, step: Any) -> dict[str, Any]:
        return {"token": self._token(step[0][0]), "logprob": step[0][1]}

    def _text(self, steps: list[list[tuple[int, float]]]) -> str:
        ids = [step[0][0] for step in steps]
        return str(self.tokenizer.decode([number for number in ids if number != self.tokenizer.eos_token_id]))

    def _top(self, row: Any, count: int) -> list[tuple[int, float]]:
        values, ids = row.topk(count)
        return [(int(number), float(value)) for number, value in zip(ids, values, strict=True)]

    def _write(self, prompt: list[int], tokens: int, top: int) -> list[list[tuple[int, float]]]:
        """For each written token: itself, and then the likeliest ones, as (id, log-probability)."""
        found: list[list[tuple[int, float]]] = []
        ids = list(prompt)
        for _ in range(tokens):
            after = self.engine.logits(ids)[-1].log_softmax(-1)
            best = self._top(after, max(1, top))
            ids.append(best[0][0])
            found.append([best[0], *best])
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return found

    def _say(self, body: dict[str, Any] | int | None) -> None:
        """Answers with `body`; a number is the status of a refusal, and None is 404."""
        status = 404 if body is None else body if isinstance(body, int) else 200
        data = json.dumps(body if isinstance(body, dict) else {"error": "refused"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serving(file: Path, tokenizer: Any, kind: str, **more: Any) -> Iterator[str]:
    """The address of a server of the GGUF model `file`."""
    engine = LlamaCpp(file, context=512)
    handler = type("Handler", (Fake,), {"engine": engine, "tokenizer": tokenizer, "kind": kind, **more})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        engine.close()
