"""What is tried of a family: one function a column, each from a folder that `saved` wrote; each in a process of its own.

A column returns what it measured. AssertionError means a wrong number, a LorakeetError a refusal, anything else a crash.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peft as real_peft
import torch
import transformers
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.errors import ConfigError, EnvironmentProblem, LorakeetError
from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.exporting.llama_cpp import LlamaCpp
from lorakeet.formats.peft import peft
from lorakeet.merging.checkpoint import open_checkpoint
from lorakeet.merging.edits import edits_for
from lorakeet.merging.merged_folder import merge_into
from lorakeet.models.files.quantized import kept_experts
from lorakeet.models.files.validate import auto_class_of
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, check_cached, step
from lorakeet.models.generate.sample import sample
from lorakeet.models.generate.score import row_losses
from lorakeet.models.inject import adapter_of, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model, load_tokenizer
from lorakeet.models.text.model import TextModel, served_context_of
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.gradients import require_gradients
from lorakeet.train.text.loss import head_losses
from lorakeet.train.text.own_code import require_own_code
from lorakeet.verbs.options import PlanOptions
from lorakeet.verbs.plan import plan
from tiny.card_column import same_on_card
from tiny.models import tiny_tokenizer
from tiny.runs import settings
from tiny.small_configs import SWITCH, small_config
from tiny.thread_pool import renew_threads

SECONDS = 60  # of the processor, for each column
LONGER = {"GPU": 240}  # a loop over tokens, as in Mamba 1, is one over launches on the simulated card
ROWS = (23, 9, 14)  # tokens; longer than the windows
EXACT = 3e-5  # of the largest logit, in fp32
GRADIENT = 1e-5  # of a tensor's gradient, by norm
NOISE = 3  # where one of the two is exceeded: as many times what the model's own code in fp32 is off its own in fp64
WINDOW = 8  # tokens, of small_configs
TOKENS = 6  # written greedily
LONGEST = 256  # tokens that a model of small_configs takes
SPEC = {"rank": 2, "alpha": 6.0}


class NotTried(Exception):
    """What the column needs is not here."""


@dataclass(frozen=True)
class Outcome:
    """What became of a column: passed, refused, wrong, crashed, too slow, not tried; with what was measured or said."""

    outcome: str
    detail: str = ""


def whole_class_of(config: Any) -> Any:
    """The Auto class whose model has all parts of the configuration, as released: Qwen3.5 can be read as its text part alone."""
    return AutoModelForMultimodalLM if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForCausalLM


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    """Writes a small random model of this type with a tokenizer to folder/model; `changes` are to its configuration."""
    config = small_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what is not written below, as a state's decay
        model = whole_class_of(config).from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(0, 0.5 / max(weight.shape[-1], 16) ** 0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0, 0.05, generator=generator)
            elif not bool(weight.any()):  # a scale that begins as nothing
                weight.normal_(0, 0.3, generator=generator)
    model.tie_weights()
    model.eval().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


@cache
def rows() -> list[Example]:
    """Rows of ordinary tokens, each of which is to be predicted."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, count in enumerate(ROWS):
        ids = torch.randint(4, 300, (count,), generator=generator).numpy()
        found.append(Example(ids, np.arange(count) > 0, str(number), None, False))
    return found


def chunked(folder: Path) -> bool:
    """Whether the model attends within chunks: served texts are no longer than one."""
    config = json.loads((folder / "model" / "config.json").read_text())
    return "attention_chunk_size" in {**config, **config.get("text_config", {})}


def loaded(folder: Path, dtype: str = "float32", attention: Any = "auto", **more: Any) -> TextModel:
    spec = ModelSpec(path=str(folder / "model"), dtype=dtype, device="cpu", attention=attention, **more)
    return load_text_model(spec, say=lambda line: None)


def with_pairs(text: TextModel, folder: Path) -> TextModel:
    """The model with pairs that have an effect; without experts where they cannot have any."""
    try:
        made = plan_for(text.model, LoraSpec(**SPEC), text.family)
    except ConfigError as error:
        if "experts cannot be adapted" not in str(error):
            raise
        made = plan_for(text.model, LoraSpec(**SPEC, exclude_modules=(".*experts",)), text.family)
        (folder / "note").write_text(f"without experts: {error}")
    text = initialise_adapter(text, made, seed=0)
    trained = trained_parameters(text.model)
    assert {name.rpartition(".")[0] for name in trained} == {entry.path for entry in made.entries}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trained.items():
            if name.endswith(".B"):
                parameter.normal_(0, 0.1, generator=generator)
    return text


def train(folder: Path) -> str:
    """Trained tensors are the planned ones, and a gradient reaches each of them; saves adapter and gradients."""
    text = with_pairs(loaded(folder), folder)
    batch = pack_examples(rows())
    hidden = text.hidden(batch)
    losses = head_losses(text, hidden, batch.target_ids)
    trained = trained_parameters(text.model)
    found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    for parameter, gradient in zip(trained.values(), found, strict=True):
        parameter.grad = gradient
    require_gradients(trained, step=2)  # refuses in a run too
    adapter = adapter_of(text.model, base=str(folder / "model"))
    peft.write(adapter, folder / "adapter")
    with torch.no_grad():
        torch.save(text.head(text.hidden(batch)), folder / "logits.pt")
    torch.save((dict(zip(trained, found, strict=True)), losses.detach()), folder / "gradients.pt")
    note = (folder / "note").read_text().partition(":")[0] + ", " if (folder / "note").exists() else ""
    return f"{note}{len(adapter.pairs)} pairs, attention {text.attention}"


def gradients(folder: Path) -> str:
    """Gradients and losses of the packed rows are those of transformers and PEFT on single rows; the files are read by PEFT."""
    ours, our_losses = torch.load(folder / "gradients.pt")
    theirs, losses = _own_gradients(folder, torch.float32)
    off, worst = _apart(ours, theirs)
    loss = float((our_losses - losses).abs().max())
    assert loss <= 1e-4, f"{loss:.2g} nats"
    return _within(
        off, GRADIENT, lambda: _apart(theirs, _own_gradients(folder, torch.float64)[0])[0], f"of the gradient of {worst}"
    )


def _within(off: float, limit: float, own_noise: Callable[[], float], of: str) -> str:
    """The difference in words; it may be `limit`, or NOISE times what the model's own code in fp32 is off its own in fp64."""
    if off <= limit:
        return f"{off:.1g}"
    noise = own_noise()
    assert off <= NOISE * noise, f"{off:.2g} {of}, own noise {noise:.2g}"
    return f"{off:.1g}, where the model's own code in fp32 is {noise:.1g} off its own in fp64"


def _own_gradients(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by our names, and the losses of all targets, by transformers and PEFT, row by row."""
    model = in_peft(folder, trainable=True).to(dtype)
    losses = torch.cat([_own_losses(model, row) for row in rows()])
    losses.sum().backward()
    return _by_our_names(model, folder), losses.detach().float()


def _apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a tensor's gradient, relative to its size, and the tensor's name; tiny ones count as larger."""
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    off = {
        name: float((gradient.double() - wanted[name].double()).norm()) / max(float(wanted[name].norm()), 1e-3 * largest)
        for name, gradient in found.items()
    }
    worst = max(off, key=lambda name: off[name])
    return off[worst], worst


def _own_losses(model: Any, row: Example) -> Tensor:
    ids = torch.from_numpy(row.ids)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    wide = logits[:-1] if logits.dtype == torch.float64 else logits[:-1].float()
    return torch.nn.functional.cross_entropy(wide, ids[1:], reduction="none")


def _by_our_names(model: Any, folder: Path) -> dict[str, Tensor]:
    """PEFT's gradients, read as an adapter of the same configuration: by path, with A and B."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    state = real_peft.get_peft_model_state_dict(model, state_dict=found)
    (folder / "read").mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "read" / "adapter_model.safetensors")
    (folder / "read" / "adapter_config.json").write_bytes((folder / "adapter" / "adapter_config.json").read_bytes())
    pairs = peft.read(folder / "read").pairs
    return {f"{path}.{side}": getattr(pair, side) for path, pair in pairs.items() for side in "AB"}


def in_peft(folder: Path, *, trainable: bool = False) -> Any:
    base = in_transformers(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return real_peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=trainable).eval()


def in_transformers(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"  # torch's grouped product takes no fp64
    model = auto_class_of(config).from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def _logits(model: Any, given: Iterable[Example] = ()) -> Tensor:
    with torch.no_grad():
        found = [model(input_ids=torch.from_numpy(row.ids)[None], use_cache=False).logits[0, :-1] for row in given or rows()]
    return torch.cat(found)


def _off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((found - wanted).abs().max()) / float(wanted.abs().max())


def peft_logits(folder: Path) -> str:
    """The real PEFT computes the live model's logits from the files."""
    base, wanted = _logits(in_transformers(folder / "model")), torch.load(folder / "logits.pt")
    off = _off(_logits(in_peft(folder)), wanted)
    assert off <= EXACT, f"{off:.2g} of the largest logit"
    assert _off(base, wanted) > 1e-3, "the adapter has no effect"
    return f"{off:.1g}"


def merge(folder: Path) -> str:
    """The merged model, loaded by transformers, computes the live model's logits; what no pair changes keeps its bytes."""
    adapter, source = peft.read(folder / "adapter"), open_checkpoint(folder / "model")
    merge_into(folder / "model", adapter, folder / "merged")
    changed = edits_for(source, adapter).by_name
    written = open_checkpoint(folder / "merged")
    assert set(written.home) == set(source.home) | set(changed)
    for name in set(source.home) - set(changed):
        assert torch.equal(written.read(name), source.read(name)), name
    merged = in_transformers(folder / "merged")
    found = _logits(merged)
    off = _off(found, torch.load(folder / "logits.pt"))
    noise = lambda: max(_off(found.double(), _logits(merged.double())), _merged_by_peft(folder))  # noqa: E731 - it is long
    return _within(off, EXACT, noise, "of the largest logit")


def _merged_by_peft(folder: Path) -> float:
    """How far the logits of PEFT's own merge are off those of its live model: each merged weight is rounded to fp32 once."""
    model = in_peft(folder)
    live = _logits(model)
    return _off(_logits(model.merge_and_unload()), live)


def bf16(folder: Path) -> str:
    """Loss and gradients in bf16 are those of the model's own code, but for rounding."""
    text = with_pairs(loaded(folder, "bfloat16"), folder)
    return f"{require_own_code(text, trained_parameters(text.model), rows()).gradient:.1g}"  # refuses a run too


def planned(folder: Path) -> str:
    """`lorakeet plan` answers."""
    run = settings(folder / "model", Path("-"), folder / "none")
    found = plan(run, PlanOptions(tokens=64), console=Console(file=io.StringIO()))
    return f"{found.planned.peak >> 20} MiB"  # type: ignore[attr-defined]


def nf4(folder: Path) -> str:
    """A base in NF4 trains: finite gradients, of every pair; says where experts stay dense."""
    text = with_pairs(loaded(folder, quantize=QuantSpec(method="nf4")), folder)
    batch, trained = pack_examples(rows()), trained_parameters(text.model)
    losses = head_losses(text, text.hidden(batch), batch.target_ids)
    found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    there = [gradient for gradient in found if gradient is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in there) and any(bool(gradient.any()) for gradient in there)
    return kept_experts(text.model)


def served(folder: Path) -> str:
    """What is served greedily is what transformers' generate writes with the merged model or PEFT."""
    text = loaded(folder)
    live, adapter = ServingModel(text), peft.read(folder / "adapter")
    within = chunked(folder)
    prompt = [int(number) for number in rows()[1].ids][: WINDOW - TOKENS if within else None]
    check_cached(text, len(prompt) + TOKENS)
    live.attach("a", adapter)
    cache = KeyValues(slots=1, capacity=len(prompt) + TOKENS)
    ids, new = list(prompt), tuple(prompt)
    for _ in range(TOKENS):
        logits = step(text, cache, [CacheRow(0, len(ids) - len(new), new, {"a": 1.0})], live.selection)
        new = (int(logits[0].argmax()),)
        ids += new
    notes = ["texts of up to a chunk of its attention"] if within else []
    model = in_peft(folder)
    try:
        wanted = _generated(model, prompt)
    except AttributeError as error:  # its configuration lacks what its own code asks it for
        wanted = _continued(model, prompt)
        notes.append(f"as its own forward passes; transformers' generate ends in AttributeError: {error}")
    assert ids == wanted, f"{ids[len(prompt) :]} for {wanted[len(prompt) :]}"
    return "; ".join(notes)


def _generated(model: Any, prompt: list[int]) -> list[int]:
    """The prompt with the TOKENS that transformers' generate writes greedily."""
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    return [int(number) for number in found[0]]


def _continued(model: Any, prompt: list[int]) -> list[int]:
    """The same by forward passes over the whole text."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def wrapped(folder: Path) -> str:
    return str(json.loads((folder / "model" / "config.json").read_text())["model_type"])


def gguf(folder: Path) -> str:
    """The exported file computes in llama.cpp what the live model computes."""
    if find_spec("llama_cpp_py_sync") is None:
        raise NotTried("the llama extra is not installed")
    tokenizer = load_tokenizer(folder / "model")
    written = write_gguf(folder / "model", peft.read(folder / "adapter"), folder / "m.gguf", tokenizer=tokenizer, quant="f32")
    within = any("attends to the last" in note for note in written.notes)  # of its window, which llama.cpp has not
    row = rows()[0].ids[: WINDOW if within else None]
    wanted = torch.load(folder / "logits.pt")[: len(row) - 1]
    with LlamaCpp(written.path, context=128) as engine:
        found = engine.logits(row.tolist())[:-1]
    off = _off(found, wanted)
    limit = 0.02 if "gemma4" in wrapped(folder) else 5e-3  # ggml looks some activations up in half-precision numbers
    assert off <= limit, f"{off:.2g} of the largest logit"
    return f"{off:.1g}"


def simulated_gpu(folder: Path) -> str:
    """A whole run on the simulated card gives the numbers of the CPU."""
    changes = {"lora.exclude_modules": ".*experts"} if (folder / "note").exists() else {}
    try:
        return same_on_card(folder, changes)
    except AssertionError:
        if "index_topk" not in (folder / "model" / "config.json").read_text():
            raise
    return same_on_card(folder, changes, seed=1)  # a token's best keys may tie to rounding: a fault is one of other rows too


def in_company(folder: Path) -> str:
    """States, losses and greedy replies of rows in one batch are those of each row alone, in every attention of the model, up to
    the most tokens that it takes; served ones too. States are transformers' own."""
    model, given = in_transformers(folder / "model"), _up_to(loaded(folder).context)
    wanted = _logits(model, given)
    with torch.no_grad():
        for attention in ("auto", "sdpa", "eager"):
            try:
                text = loaded(folder, attention=attention)
            except EnvironmentProblem:  # it would give other logits, which the check at loading refuses
                if attention == "auto":
                    raise
                continue
            off = _off(text.head(text.hidden(pack_examples(given))), wanted)
            _within(off, EXACT, lambda: _off(wanted.double(), _logits(model.double(), given)), f"with {attention}")
    text = loaded(folder)
    own = [
        float(torch.nn.functional.cross_entropy(part, torch.from_numpy(row.ids[1:]), reduction="sum"))
        for part, row in zip(wanted.split([len(row.ids) - 1 for row in given]), given, strict=True)  # type: ignore[no-untyped-call]
    ]
    np.testing.assert_allclose(row_losses(text, given, micro_tokens=2 * LONGEST)[0], own, rtol=EXACT)
    longest = max(len(row.ids) for row in given) - TOKENS
    prompts = [row.ids[: longest - number] for number, row in enumerate(given)]
    together = [ids.tolist() for ids in sample(text, prompts, max_tokens=TOKENS, temperature=0)]
    assert together == [sample(text, [prompt], max_tokens=TOKENS, temperature=0)[0].tolist() for prompt in prompts]
    return f"{text.attention}, {_served_in_company(text, folder)}"


@cache
def _up_to(context: int | None) -> list[Example]:
    """Rows of few tokens, of about SWITCH, and of as many as the model takes."""
    most, generator = min(context or LONGEST, LONGEST), torch.Generator().manual_seed(3)
    made = [torch.randint(4, 300, (count,), generator=generator).numpy() for count in (SWITCH, most, SWITCH + 1, 3, most - 1)]
    return rows() + [Example(ids, np.arange(len(ids)) > 0, f"{len(ids)} tokens", None, False) for ids in made]


def _served_in_company(text: TextModel, folder: Path) -> str:
    """Logits of the server's slots, up to the most tokens that are served, are those of transformers for each text alone."""
    most = min(served_context_of(text.model.config) or LONGEST, LONGEST, WINDOW if chunked(folder) else LONGEST)
    try:
        check_cached(text, most)
    except ConfigError as error:
        return f"not served: {error}"
    cache = KeyValues(slots=4, capacity=most)
    begun = [row.ids[: max(most - TOKENS - skip, 1)].tolist() for skip, row in enumerate(rows())]
    begun += [_up_to(text.context)[4].ids[: most - TOKENS].tolist()]
    texts, new, model = [list(ids) for ids in begun], [tuple(ids) for ids in begun], in_transformers(folder / "model")
    for _ in range(TOKENS):
        found = step(text, cache, [CacheRow(slot, len(ids) - len(new[slot]), new[slot], {}) for slot, ids in enumerate(texts)])
        with torch.no_grad():
            own = torch.stack([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in texts])
        assert (off := _off(found, own)) <= EXACT, f"served: {off:.2g}"
        new = [(int(each.argmax()),) for each in own]
        texts = [ids + list(added) for ids, added in zip(texts, new, strict=True)]
    return f"served up to {most} tokens"


COLUMNS: dict[str, Callable[[Path], str]] = {
    "train": train, "gradients": gradients, "bf16": bf16, "PEFT": peft_logits, "merge": merge, "plan": planned, "NF4": nf4,
    "serve": served, "GGUF": gguf, "GPU": simulated_gpu,
}  # fmt: skip
OTHERS: dict[str, Callable[[Path], str]] = {"company": in_company}  # which the page of models does not show
ALONE = ("company", "train", "bf16", "plan", "NF4")  # columns that read nothing that `train` wrote


def tried(kind: str, folder: Path, columns: Iterable[str] = COLUMNS) -> dict[str, Outcome]:
    """What became of each column, each in a process of its own, within SECONDS (or LONGER) of the processor's time.

    The key "build" is in it if transformers could not make the small model.
    """
    built = _in_process(lambda: str(saved(kind, folder)))
    if built.outcome != "passed":
        return {"build": replace(built, outcome="not tried")}  # what is written there is no model of Lorakeet's
    found: dict[str, Outcome] = {}
    for column in columns:
        if column in ALONE or found["train"].outcome == "passed":
            found[column] = _in_process(lambda: {**COLUMNS, **OTHERS}[column](folder), LONGER.get(column, SECONDS))  # noqa: B023 - called at once
            found[column] = replace(found[column], detail=found[column].detail.replace(str(folder), "."))
    return found


def planned_at_full_size(kind: str, folder: Path) -> Outcome:
    """What becomes of a plan of this type with the sizes that its configuration has by default; its files hold no weights."""
    transformers.CONFIG_MAPPING[kind]().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return _in_process(lambda: planned(folder))


def _in_process(work: Callable[[], str], seconds: int = SECONDS) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        renew_threads()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds + int(sum(os.times()[:2])), resource.RLIM_INFINITY))
        try:
            os.write(writing, json.dumps(asdict(_outcome(work))).encode())
        finally:
            os._exit(0)  # also where nobody reads it any more: the child must not go on as its parent
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        return Outcome(**json.loads(said))
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
    slow = ended == "SIGXCPU"
    return Outcome("too slow" if slow else "crashed", f"not done after {seconds} s of the processor's time" if slow else ended)


def _outcome(work: Callable[[], str]) -> Outcome:
    try:
        return Outcome("passed", work())
    except AssertionError as error:
        return Outcome("wrong", str(error)[:300])
    except NotTried as error:
        return Outcome("not tried", str(error))
    except LorakeetError as error:
        return Outcome("refused", str(error)[:600])
    except BaseException as error:
        return Outcome("crashed", f"{type(error).__name__}: {error}"[:300])
