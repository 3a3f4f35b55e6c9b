"""Messages of Python calls name arguments: no flag of the command line, whichever argument is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from torch import nn

import lorakeet as lk
from api.conftest import Shared
from lorakeet.api.arguments import as_argument, in_python
from lorakeet.errors import ConfigError, LorakeetError, respelt, spelling
from lorakeet.models.spec import ModelSpec
from lorakeet.serve.sampling import Sampling
from lorakeet.settings import choices, describe
from lorakeet.verbs.options import EvaluateOptions, ExportOptions, MergeOptions, PredictOptions, VerifyOptions
from tiny.runs import reviews

OPTIONS: dict[str, type[Any]] = {
    "merge": MergeOptions, "export": ExportOptions, "predict": PredictOptions, "evaluate": EvaluateOptions,
    "verify": VerifyOptions, "rows": lk.Data, "load": ModelSpec, "generate": Sampling,
}  # fmt: skip
PASSED_ON = ("runs_or_adapters", "run_or_adapter", "path", "train", "held_out_fraction")  # by an argument of another name
WRONG = ("no/such", -1, object())
NAMED = {"source": "train rows", "held_out": "held_out rows", "test": "test rows"}  # arguments in messages, by another name
VALID = ("merge(out='no/such')", "merge(out=-1)")  # which take the longest


def wrong_values(kind: Any) -> tuple[Any, ...]:
    """Values of an option that are of a wrong type, out of range, or name nothing."""
    said = describe(kind)
    if choices(kind) or "true or false" in said:
        return ("maybe",)
    return (-1, 10**9) if "number" in said else ("no/such",)


def calls(shared: Shared, place: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each function with each of its arguments wrong."""
    run, model, net = shared.run, shared.run.model, nn.Sequential(nn.Linear(4, 4))

    def by_place(name: str, path: Any) -> Any:
        return getattr(lk, name)(path)

    def merged(run: Any, **more: Any) -> Any:
        return lk.merge(run, **more)

    good: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "merge": (merged, {"run": run, "out": place / "merged"}),
        "export": (lk.export, {"run": run, "out": place / "a.gguf"}),
        "predict": (lk.predict, {"run": run, "data": reviews(3)}),
        "evaluate": (lk.evaluate, {"run": run, "data": reviews(30)}),
        "verify": (lambda run, **more: lk.verify(run, place / "none", **more), {"run": run}),
        "load": (lk.load, {"model": shared.model.spec.path}),
        "rows": (lambda source, **more: lk.rows(source, **more).train, {"source": reviews(30)}),
        "generate": (model.generate, {"prompt": "a", "max_tokens": 2}),
        "finetune": (lk.finetune, {"model": model, "rows": reviews(30), "train": lk.Train(steps=1), "out": place / "run"}),
        "resume": (lk.resume, {"run": run}),
        "open_run": (lk.open_run, {"path": run.path}),
        "classify": (run.classify, {"texts": ["a"]}),
        "plan": (model.plan, {}),
        "losses": (model.losses, {"rows": run.rows}),
        "read": (lk.Adapter.read, {"path": run.path}),
        "write": (run.adapter.write, {"path": place / "adapter"}),
        "combine": (lk.combine, {"adapters": {"a": run.adapter}}),
        "attach": (lk.attach, {"net": net, "lora": lk.Lora(rank=2, target_modules=("0",))}),
        "to_peft": (lk.to_peft, {"adapter": run.adapter, "model": net}),
        "from_peft": (lk.from_peft, {"model": net}),
        **{name: (getattr(lk, name), {"net": net}) for name in ("parameters", "adapter_of", "detach")},
        "activate": (lk.activate, {"net": net, "name": None}),
        **{name: (partial(by_place, name), {"path": run.path}) for name in dir(lk) if name.startswith("read_")},
    }
    for name, (function, given) in good.items():
        known = inspect.signature(function).parameters
        named = [key for key, found in known.items() if found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)]
        for key in dict.fromkeys([*given, *named]):
            for value in (one for one in WRONG if f"{name}({key}={one!r})" not in VALID):
                yield f"{name}({key}={value!r:.9})", lambda f=function, all=given, k=key, v=value: f(**{**all, k: v})
        for field in dataclasses.fields(OPTIONS[name]) if name in OPTIONS else ():
            if field.name in PASSED_ON or field.name in named:
                continue
            for value in wrong_values(get_type_hints(OPTIONS[name])[field.name]):
                yield f"{name}({field.name}={value!r})", lambda f=function, a=given, k=field.name, v=value: f(**{**a, k: v})


@pytest.mark.slow
def test_no_message_has_a_flag(shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = 0
    for number, (name, call) in enumerate(calls(shared, tmp_path)):
        (place := tmp_path / str(number)).mkdir()  # relative names of results begin in a folder of their own
        monkeypatch.chdir(place)
        try:
            call()
        except LorakeetError as error:
            refused += 1
            assert "--" not in str(error) and "lorakeet " not in str(error), f"{name}: {error}"
            if "<object" in name:
                argument = name.partition("(")[2].partition("=")[0]
                assert NAMED.get(argument, argument) in str(error), f"{name}: {error}"
        else:
            assert "<object" not in name, f"{name} was accepted"
        for path in (tmp_path / "merged", tmp_path / "run", tmp_path / "adapter"):
            shutil.rmtree(path, ignore_errors=True)
        (tmp_path / "a.gguf").unlink(missing_ok=True)
    assert refused > 150


SECTIONS = (lk.Lora, lk.Train, lk.Data, lk.Evaluate, lk.Ranks, lk.Preference, lk.Memory, lk.RunConfig)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_refuses_another_type_when_it_is_made(section: type[Any]) -> None:
    for field in dataclasses.fields(section):
        with pytest.raises(ConfigError, match=f"^{field.name}.* is <object"):
            section(**{field.name: object()})


@pytest.mark.parametrize(("message", "said"), [
    ("keep it: lorakeet merge RUN --into packed.", "keep it: lk.merge(RUN, into='packed')."),
    ("merge with --dtype float32. Otherwise", "merge with dtype='float32'. Otherwise"),
    ("Set --data.encoding cp1252 if it reads right.", "Set encoding='cp1252' if it reads right."),
    ("is --base the right model?", "is base= the right model?"),
    ("use it with --uncertified.", "use it with uncertified=True."),
    ("Go on: lorakeet finetune --resume runs/x", "Go on: lk.resume('runs/x')"),
    ("start with --model.dtype float32, or --lora.rank 8.", "start with lk.load(dtype='float32'), or lk.Lora(rank=8)."),
    ("a--b -- c, and lorakeet convert RUN --to gguf.", "a--b -- c, and lorakeet convert RUN --to gguf."),
])  # fmt: skip
def test_flags_and_commands_become_arguments_and_calls(message: str, said: str) -> None:
    assert respelt(message) == message, "on the command line it stays"
    with spelling(as_argument):
        assert respelt(message) == said == respelt(said) == str(LorakeetError(message))
    assert (as_argument("memory", "2GiB"), in_python("memory", "2GiB")) == ("memory='2GiB'", "lk.load(budget='2GiB')")
