"""`verification.server`: a served model is compared by what it tells, and what it does not tell is listed."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Pair
from lorakeet.data.prepare import load_dataset
from lorakeet.errors import EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import Check, read_certificate
from lorakeet.evaluate.parity import Tolerance
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.tolerances import F16
from lorakeet.formats.gguf import permute, unpermute
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model, load_tokenizer
from lorakeet.models.text.serving import ServingModel
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.runs.server_answer import CallRefused
from lorakeet.serve.engine import Engine
from lorakeet.serve.registry import Registry
from lorakeet.serve.service import Service
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions, VerifyOptions
from lorakeet.verbs.verify import verify
from lorakeet.verification import server, server_apis
from lorakeet.verification.artefact import InTorch, live_side
from lorakeet.verification.probes import probes_of
from lorakeet.verification.rounding import Reported
from lorakeet.verification.server import Server, _label, check_server
from lorakeet.verification.server_apis import Api, Step, Token, Written
from tiny import servers
from tiny.exports import loud_run, write_model
from tiny.llama_cpp import llama_server
from tiny.runs import quiet
from tiny.servers import Fake, serving
from tiny.site import Site


def kinds(checks: Sequence[Check]) -> list[str]:
    return [check.name.rpartition(": ")[2] for check in checks]


@pytest.fixture(scope="module")
def loud(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_run(finished.path, tmp_path_factory.mktemp("loud") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OpenAI", "llama.cpp", "Ollama"])
def test_the_right_model_passes_and_the_base_does_not(finished: Any, loud: Path, kind: str, tmp_path: Path) -> None:
    run = shutil.copytree(loud, tmp_path / "run")  # whose certificate will hold a failed check
    adapter, tokenizer = open_adapter(run).adapter, load_tokenizer(finished.model)
    with serving(write_model(finished.model, adapter, tmp_path / "right.gguf"), tokenizer, kind) as right:
        found: Any = verify(VerifyOptions(str(run), against=(right,), rows=4), console=quiet())
    checks = found.certificate.checks
    tells = kind in ("llama.cpp", "vLLM", "SGLang")
    first = "prompt ids" if tells else "prompt lengths"
    assert kinds(checks) == [first, "greedy text", "log-probabilities", "answers", "modules", "scale"]
    told = checks[2]
    assert told.measured["mean_kl"] < 1e-5 and told.measured["top1_agreement"] == 1 and told.measured["effect"] < 1e-3
    assert told.n == (sum_of_places(run) if kind in ("vLLM", "SGLang") else told.n) and told.n >= 8
    said = {"llama.cpp": "F16", "Ollama": "F16", "SGLang": "float16"}
    assert (f"The server says that its number format is {said.get(kind)}." in told.detail) is (kind in said)
    assert set(told.estimates) == {"mean_kl", "top1_agreement"}
    answers = checks[3]
    assert answers.measured == {"different_answers": 0} and answers.n == 4
    assert answers.estimates["accuracy_live"] == answers.estimates["accuracy_there"]
    missing = {str(one) for one in found.certificate.unchecked}
    assert f"not checked: the stored weights of {right}, since a server does not tell them" in missing
    for what in ("conversations", "raw texts"):
        line = f"not checked: the token ids of {what} of {right}, since the server does not tell"
        assert (line in missing) is not tells
    base = write_model(finished.model, None, tmp_path / "wrong.gguf")
    with serving(base, tokenizer, kind) as wrong, pytest.raises(VerificationFailed, match="first diverging token is") as caught:
        verify(VerifyOptions(str(run), against=(wrong,), rows=2), console=quiet())
    assert "log-probabilities" in str(caught.value) and "Likely cause: the adapter is not applied" in str(caught.value)
    assert "effect" in str(caught.value)


@pytest.mark.slow
def test_a_server_of_fewer_bits_says_so_and_they_must_be_meant(finished: Any, loud: Path, tmp_path: Path) -> None:
    """Its own word sets no wide limits: a wrong adapter there fails as in 16 bits, with the option that would allow 4 bits."""
    run = shutil.copytree(loud, tmp_path / "run")
    file, tokenizer = write_model(finished.model, None, tmp_path / "base.gguf"), load_tokenizer(finished.model)
    with serving(file, tokenizer, "llama.cpp", form="Q4_K - Medium") as url, pytest.raises(VerificationFailed) as caught:
        verify(VerifyOptions(str(run), against=(url,), rows=2), console=quiet())
    assert "its number format is Q4_K - Medium. If fewer bits than the trained base has are meant, give --precision 4-bit" in str(
        caught.value
    )


def sum_of_places(run: Path) -> int:
    opened = open_adapter(run)
    probes = probes_of(opened, load_dataset(opened.config.data), live_side(opened, quiet()), 4)
    return sum(len(ids) - 1 for ids in probes.rows)


def third(_: str, pair: Pair) -> Pair:
    return dataclasses.replace(pair, alpha=4.0)


def permuted(path: str, pair: Pair) -> Pair:
    heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2], 0)
    if not heads:
        return pair
    return dataclasses.replace(pair, A=permute(pair.A.t().contiguous(), heads).t().contiguous(), B=unpermute(pair.B, heads))


def without_a_block(path: str, pair: Pair) -> Pair:
    return dataclasses.replace(pair, B=pair.B * 0) if ".layers.1." in path else pair


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutate", "cause"),
    [
        (third, "the scale is 0.3333 times what it should be"),
        (permuted, "A of q and k is permuted instead of B"),
        (without_a_block, "the pairs of model.layers.1 are missing"),
    ],
)
def test_each_mistake_of_a_served_model_is_named(finished: Any, loud: Path, mutate: Any, cause: str, tmp_path: Path) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    held = open_adapter(run).adapter
    wrong = dataclasses.replace(held, pairs={path: mutate(path, pair) for path, pair in held.pairs.items()})
    file = write_model(finished.model, wrong, tmp_path / "wrong.gguf")
    for kind in ("llama.cpp", "vLLM"):
        with serving(file, load_tokenizer(finished.model), kind) as url, pytest.raises(VerificationFailed) as caught:
            verify(VerifyOptions(str(run), against=(url,), rows=2), console=quiet())
        assert f"{url}: log-probabilities" in str(caught.value) and cause in str(caught.value)


@pytest.mark.slow
def test_another_template_is_seen_from_lengths_alone(finished: Any, loud: Path, tmp_path: Path) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    file = write_model(finished.model, open_adapter(run).adapter, tmp_path / "right.gguf")
    tokenizer = load_tokenizer(finished.model)
    tokenizer.chat_template = tokenizer.bos_token + tokenizer.chat_template
    for kind, words in (("llama.cpp", "BOS is doubled or added"), ("Ollama", "another chat template, or a begin token more")):
        with serving(file, tokenizer, kind) as url, pytest.raises(VerificationFailed, match=words):
            verify(VerifyOptions(str(run), against=(url,), rows=2), console=quiet())


@pytest.mark.slow
def test_a_server_that_tells_texts_alone_is_read_by_them(finished: Any, loud: Path, tmp_path: Path) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    tokenizer = load_tokenizer(finished.model)
    right = write_model(finished.model, open_adapter(run).adapter, tmp_path / "right.gguf")
    wrong = write_model(finished.model, None, tmp_path / "wrong.gguf")
    with serving(right, tokenizer, "Ollama", logprobs=False) as url:
        found: Any = verify(VerifyOptions(str(run), against=(url,), rows=2), console=quiet())
    assert kinds(found.certificate.checks) == ["prompt lengths", "greedy text", "answers"]
    greedy = found.certificate.checks[1]
    assert set(greedy.measured) == {"gap"} and greedy.n > 4
    line = f"not checked: log-probabilities and their KL of {url}, since the server does not tell"
    assert line in {str(one) for one in found.certificate.unchecked}
    with serving(wrong, tokenizer, "Ollama", logprobs=False) as url, pytest.raises(VerificationFailed, match="first diverging"):
        verify(VerifyOptions(str(run), against=(url,), rows=2), console=quiet())


class Lying(Api):
    """A server that tells ids of no token, more tokens than it was told to, and texts without end."""

    ids: tuple[int, ...] = (-1, 10**6, 10**12, -(10**12))

    def tokenise(self, text: str) -> list[int]:
        return list(self.ids)

    def prompt(self, messages: Any) -> list[int]:
        return self.tokenise("")

    def write(self, prompt: Sequence[int], tokens: int) -> Written:
        steps = [Step(Token("x", number, -0.1), (Token("x", number, -0.1), Token("y", 7, -2.0))) for number in self.ids]
        return Written("x" * 10**6, tuple(steps * 5000))

    chat = write

    def along(self, ids: Sequence[int]) -> dict[int, tuple[Token, ...]]:
        return {place: (Token("x", number, -0.1),) for place in (-7, 0, 1, 10**9) for number in self.ids}

    def about(self) -> str:
        return "a lie"


@pytest.mark.slow
@pytest.mark.parametrize("ids", [Lying.ids, (5,)])
def test_a_lying_server_fails_and_breaks_nothing(
    finished: Any, loud: Path, ids: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    monkeypatch.setattr(Lying, "ids", ids)
    monkeypatch.setattr(server, "find_api", Lying)
    read: list[int] = []
    logits = InTorch.logits
    monkeypatch.setattr(InTorch, "logits", lambda side, ids, last=None: read.append(len(ids)) or logits(side, ids, last))
    with pytest.raises(VerificationFailed):
        verify(VerifyOptions(str(run), against=("http://127.0.0.1:9#x",), rows=2), console=quiet())
    assert max(read) < 500, "the server was told to write a few tokens"


@pytest.mark.slow
def test_a_check_says_when_and_against_what_it_was_made(finished: Any, loud: Path, tmp_path: Path) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    tokenizer = load_tokenizer(finished.model)
    files = [write_model(finished.model, held, tmp_path / f"{bool(held)}.gguf") for held in (None, open_adapter(run).adapter)]
    with serving(files[0], tokenizer, "llama.cpp") as wrong, pytest.raises(VerificationFailed):
        verify(VerifyOptions(str(run), against=(wrong,), rows=1), console=quiet())
    with serving(files[1], tokenizer, "llama.cpp") as right:
        verify(VerifyOptions(str(run), against=(right,), rows=1), console=quiet())
    kept = read_certificate(run / "certificate.json")
    dated = [check for check in kept.checks if check.artefact in (wrong, right)]
    assert len(dated) == 8 and {check.against for check in dated} == {"/models/tiny.gguf by llama.cpp b7"}
    assert all(abs((datetime.now(timezone.utc) - datetime.fromisoformat(check.made)).total_seconds()) < 600 for check in dated)
    assert {one.artefact for one in kept.unchecked} == {wrong, right}
    page = (run / "report.html").read_text()
    assert "by llama.cpp b7" in page and f"not checked: the stored weights of {right}" in page and dated[0].made in page


@pytest.mark.slow
def test_lorakeet_serve_gives_what_the_live_adapter_gives(finished: Any, loud: Path, tmp_path: Path) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    text = load_text_model(ModelSpec(path=str(finished.model), dtype="float32"))
    live = ServingModel(text)
    engine = Engine(text, live.selection, slots=2, context=256, chunk=64)
    engine.start()
    registry = Registry(live, engine, base="base", budget=None, changed=lambda: None)
    registry.register("mine", run)
    site = Site(Service(text, engine, registry))
    try:
        found: Any = verify(VerifyOptions(str(run), against=(f"{site.url}#mine",), precision="float32", rows=4), console=quiet())
        names = kinds(found.certificate.checks)
        with pytest.raises(VerificationFailed, match="the adapter is not applied"):
            verify(VerifyOptions(str(run), against=(f"{site.url}/v1#base",), rows=2), console=quiet())
    finally:
        site.stop()
        engine.drain(timeout=0.0)
    assert names == ["prompt ids", "greedy text", "log-probabilities", "answers", "modules", "scale"]
    assert found.certificate.checks[2].measured["mean_kl"] < 1e-8


@pytest.mark.slow
def test_a_real_llama_server_writes_what_the_live_adapter_writes_merged_or_not(finished: Any, tmp_path: Path) -> None:
    run = shutil.copytree(finished.path, tmp_path / "run")
    adapter = open_adapter(run).adapter
    merged, base = (write_model(finished.model, held, tmp_path / name) for held, name in ((adapter, "m.gguf"), (None, "b.gguf")))
    convert(ConvertOptions(run, tmp_path / "a.gguf", to="gguf", base=finished.model), console=quiet())
    for model, adapters in ((merged, ()), (base, (tmp_path / "a.gguf",))):
        with llama_server(model, *adapters) as url:
            found: Any = verify(VerifyOptions(str(run), against=(url,), rows=4), console=quiet())
            names = [check.name.rpartition(": ")[2] for check in found.certificate.checks]
            assert names == ["prompt ids", "greedy text", "log-probabilities", "answers", "modules", "scale"]
            assert found.certificate.checks[2].against.startswith(f"{model} by llama.cpp")
    with llama_server(base) as url, pytest.raises(VerificationFailed, match="first diverging token"):
        verify(VerifyOptions(str(run), against=(url,), rows=2), console=quiet())


def test_the_label_that_was_written_is_the_longest_that_fits() -> None:
    labels = ["bad", "bad taste", "good"]
    found = [_label(labels, text) for text in (" bad taste.", "bad", "good\n", "goo", "")]
    assert found == [1, 0, 2, -1, -1]


def test_nothing_there_is_said() -> None:
    with pytest.raises(EnvironmentProblem, match="gives no answer that can be used"):
        Server("http://127.0.0.1:9", F16)


class Leaving(Fake):
    """A server that answers some requests, and then refuses all, or closes every connection."""

    left, status = 8, 500

    def do_POST(self) -> None:
        type(self).left -= 1
        if self.left >= 0:
            super().do_POST()
        elif not self.status:
            self.connection.close()
        else:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(self.status)
            self.end_headers()


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 401, 429, 500])
def test_what_was_checked_before_a_server_went_away_is_kept_and_incomplete(
    finished: Any, loud: Path, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    file = write_model(finished.model, open_adapter(run).adapter, tmp_path / "right.gguf")
    monkeypatch.setattr(servers, "Fake", type("Leaving", (Leaving,), {"left": 10, "status": status}))
    monkeypatch.setattr(server_apis, "PAUSES", (0.0,))
    ends = pytest.raises(EnvironmentProblem, match=r"checks of .* passed until then; they are incomplete")
    with serving(file, load_tokenizer(finished.model), "llama.cpp") as url, ends as caught:
        verify(VerifyOptions(str(run), against=(url,), rows=1, modules=False), console=quiet())
    assert caught.value.exit_code == 2 and (f"({status} " in str(caught.value) or not status)
    kept = read_certificate(run / "certificate.json")
    assert set(kept.incomplete) == {url} and kept.artefacts[url] == "failed"
    assert [check.name for check in kept.checks if check.artefact == url][:1] == [f"{url}: prompt ids"]
    assert "the server stopped answering" in {one.why for one in kept.unchecked}
    assert "incomplete" in (run / "certificate.json").read_text()


@pytest.mark.parametrize(("code", "serves_it", "differs"), [(404, False, True), (400, False, True), (404, True, False)])
def test_a_model_that_the_server_has_no_more_is_a_difference(code: int, serves_it: bool, differs: bool) -> None:
    """A removed adapter is refused for ever: `verify --watch` ends with 3, and the certificate is whole."""

    def refused() -> str:
        raise CallRefused(f"/v1/completions refuses ({code}): no such model", code)

    api = SimpleNamespace(about=refused, serves_it=lambda: serves_it)
    gone: Any = SimpleNamespace(name="http://h#a", allowed=F16, api=api)
    live: Any = SimpleNamespace(name="live")
    probes: Any = None
    found = check_server(live, gone, probes, EvaluateSpec())
    assert bool(found.ended) is not differs
    assert [(check.name, check.passed) for check in found.checks] == ([("http://h#a: model", False)] if differs else [])
    assert all("no such model" in check.detail for check in found.checks)


def test_a_failed_check_wins_over_an_early_end(
    finished: Any, loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    file = write_model(finished.model, open_adapter(run).adapter, tmp_path / "right.gguf")
    tokenizer = load_tokenizer(finished.model)
    tokenizer.chat_template = tokenizer.bos_token + tokenizer.chat_template
    monkeypatch.setattr(servers, "Fake", type("Leaving", (Leaving,), {"left": 10, "status": 500}))
    with serving(file, tokenizer, "llama.cpp") as url, pytest.raises(VerificationFailed, match="BOS is doubled"):
        verify(VerifyOptions(str(run), against=(url,), rows=1, modules=False), console=quiet())


@pytest.mark.parametrize(
    ("served", "noise", "right"), [("base", 0.0, False), ("base", 0.3, False), ("own", 0.0, True), ("own", 1.5, True)]
)
def test_the_base_is_seen_where_rounding_could_explain_all_that_the_adapter_changes(
    served: str, noise: float, right: bool, loud: Path
) -> None:
    """Limits of few bits are wider than a small adapter's effect; but rounding leads no server to the base."""
    opened = open_adapter(loud)
    live = live_side(opened, quiet())
    probes = probes_of(opened, opened.dataset, live, 8)
    base, generator, reported = dataclasses.replace(live, adapter=None), torch.Generator().manual_seed(0), []
    for ids in probes.rows:
        table = (live if served == "own" else base).logits(ids.tolist())
        moved = (live.logits(ids.tolist()) - base.logits(ids.tolist())).std()
        table = (table + noise * moved * torch.randn(table.shape, generator=generator)).log_softmax(-1)
        top = table.topk(10).indices.tolist()
        known = {place: dict(zip(top[place], table[place][top[place]].tolist(), strict=True)) for place in range(len(ids) - 1)}
        reported.append(Reported(ids.tolist(), known))
    wide = Tolerance(logit=math.inf, mean_kl=math.inf, top1_agreement=0.0, loss=math.inf, effect=math.inf)
    allowed = dataclasses.replace(F16, parity=wide, gap=math.inf, difference=math.inf)
    there: Any = SimpleNamespace(api=SimpleNamespace(takes_ids=True), allowed=allowed, name="there", said="")
    compared = server._Comparison(live, there, probes, EvaluateSpec())
    compared.check_reported(reported)
    (check,) = compared.checks
    assert check.passed == right and (check.measured["nearer_base"] <= server.NEARER) == right
    assert right or "the adapter is not applied" in check.detail


@pytest.mark.slow
def test_another_answer_counts_unless_the_live_model_is_undecided(loud: Path) -> None:
    """Few bits flip an answer where two are nearly as likely; one that is clearly worse, or told as text alone, is different."""
    opened = open_adapter(loud)
    live = live_side(opened, quiet())
    probes = probes_of(opened, opened.dataset, live, 4)
    decode = live.text.tokenizer.decode

    def answers(allowed: Any, *, tokens_told: bool = True) -> Check:
        def write(prompt: Sequence[int], tokens: int) -> Written:
            row = next(one for one in probes.labelled if one.prompt.tolist() == list(prompt))
            first = decode(live.greedy(list(prompt), tokens, frozenset())[:1])
            others = [ids.tolist() for ids in row.completions if not decode(ids.tolist()).startswith(first)]
            steps = tuple(Step(Token(decode([number]), number, -0.5)) for number in others[0])
            return Written("".join(step.token.text for step in steps), steps if tokens_told else ())

        there: Any = SimpleNamespace(api=SimpleNamespace(takes_ids=True, write=write), allowed=allowed, name="there")
        compared = server._Comparison(live, there, probes, EvaluateSpec())
        compared.check_answers()
        return compared.checks[0]

    wide, narrow = dataclasses.replace(F16, gap=1e3), dataclasses.replace(F16, gap=1e-4)
    assert answers(narrow).measured == answers(wide, tokens_told=False).measured == {"different_answers": 1}
    undecided = answers(wide)
    assert undecided.measured == {"different_answers": 0} and undecided.passed
    assert "4 more differ where the live adapter is undecided within 1e+03 nats." in undecided.detail
