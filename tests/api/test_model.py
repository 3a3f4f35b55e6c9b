"""A base model from Python: planned, generated from with adapters, streamed."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import yaml

import lorakeet as lk
from api.conftest import Shared
from lorakeet.errors import ConfigError, DataError, LorakeetError
from lorakeet.models.generate.sample import sample
from tiny.exports import certified_anew

QUESTION = "alder birch cedar GOOD"


def test_replies_are_the_greedy_ones(shared: Shared) -> None:
    """The reply is what `sample` writes after the prompt as training encodes it, base and adapter in one batch."""
    model = shared.model
    both = model.generate([QUESTION, QUESTION], adapter=[None, shared.run], max_tokens=8)
    assert both[0] == model.generate(QUESTION, max_tokens=8)
    assert both[1] == shared.run.generate(QUESTION, max_tokens=8)
    assert both[1] == model.generate(QUESTION, adapter=shared.run.adapter, max_tokens=8)
    assert both[0] != both[1]
    with model.computing_with(shared.run.adapter) as text:
        asked = [{"role": "user", "content": QUESTION}]
        prompt = text.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        [ids] = sample(text, [prompt], max_tokens=8, temperature=0)
    assert both[1] == text.tokenizer.decode(ids, skip_special_tokens=True)
    message = [{"role": "user", "content": QUESTION}]
    assert model.generate(message, adapter=shared.run, max_tokens=8) == both[1]
    assert model.generate([message], adapter=shared.run.path, max_tokens=8) == [both[1]]


def test_a_run_on_labelled_texts_writes_prompts_as_its_rows_were(shared: Shared, tmp_path: Path) -> None:
    """A newcomer's case: 'New York' was the answer to a text that the template of the rows would have made a question."""
    folder = tmp_path / "templated"
    shutil.copytree(shared.run.path, folder)
    config = (folder / "config.yaml").read_text()
    template = "Review: {text}\nOpinion:"
    (folder / "config.yaml").write_text(yaml.safe_dump({**yaml.safe_load(config), "data": {
        **yaml.safe_load(config)["data"], "template": template, "system": "alder alder"}}))  # fmt: skip
    certified_anew(folder)
    run, filled = lk.open_run(folder), template.format(text=QUESTION)
    written = [{"role": "system", "content": "alder alder"}, {"role": "user", "content": filled}]
    expected = shared.model.generate(written, adapter=shared.run.adapter, max_tokens=8)
    for adapter in (run, folder):
        assert shared.model.generate(QUESTION, adapter=adapter, max_tokens=8) == expected
    assert shared.model.generate(filled, adapter=run, max_tokens=8) == expected, "a text that is in the template already"
    assert "".join(shared.model.stream(QUESTION, adapter=run, max_tokens=8)) == expected
    bare = shared.model.generate([written[0], {**written[1], "content": QUESTION}], adapter=run, max_tokens=8, template=False)
    assert bare == shared.model.generate(QUESTION, adapter=run, max_tokens=8, template=False) != expected
    assert shared.model.generate([QUESTION, QUESTION], adapter=[None, run], max_tokens=8) == [
        shared.model.generate(QUESTION, max_tokens=8), expected
    ]  # fmt: skip


def test_pieces_are_the_reply(shared: Shared) -> None:
    settings = {"max_tokens": 12, "temperature": 0.9, "seed": 3}
    whole = shared.model.generate(QUESTION, adapter=shared.run, **settings)
    pieces = list(shared.model.stream(QUESTION, adapter=shared.run, **settings))
    assert "".join(pieces) == whole and len(pieces) > 1
    first = next(iter(shared.model.stream(QUESTION, adapter=shared.run, **settings)))
    assert first == pieces[0] and shared.model.generate(QUESTION, adapter=shared.run, **settings) == whole


def test_a_call_waits_for_a_stream_and_a_release_cuts_it(shared: Shared, tiny_llama_folder: Path) -> None:
    model = lk.load(tiny_llama_folder, dtype="float32")
    assert model.generate([]) == []
    whole = model.generate(QUESTION, max_tokens=40)
    stream = model.stream(QUESTION, max_tokens=40)
    first = next(stream)
    model.generate([QUESTION] * 3, max_tokens=2)  # needs a larger cache
    assert first + "".join(stream) == whole
    stream = model.stream(QUESTION, max_tokens=1500)
    next(stream)
    model.release()
    with pytest.raises(LorakeetError, match="This reply was cut short: the model was released"):
        list(stream)
    late = model.stream(QUESTION, max_tokens=2)
    model.release()
    with pytest.raises(LorakeetError, match="The model was released while this reply was open"):
        next(late)


def test_a_model_that_is_gone_leaves_no_thread(tiny_llama_folder: Path) -> None:
    model = lk.load(tiny_llama_folder, dtype="float32")
    model.generate(QUESTION, max_tokens=2)
    engine = model._opened._engine  # type: ignore[union-attr]
    assert engine._thread.is_alive()
    del model
    gc.collect()
    assert not engine._thread.is_alive()


def test_released_weights_are_freed(tiny_llama_folder: Path) -> None:
    model = lk.load(tiny_llama_folder, dtype="float32")
    for _ in range(2):
        before = model.generate(QUESTION, max_tokens=2)
        weights = weakref.ref(model._opened.text.model)  # type: ignore[union-attr]
        model.release()
        gc.collect()
        assert weights() is None
    assert model.generate(QUESTION, max_tokens=2) == before
    model.release()


def test_numbers_that_change_in_place_are_another_adapter(shared: Shared) -> None:
    adapter = lk.Adapter.read(shared.run.path, quiet=True)
    before = shared.model.generate(QUESTION, adapter=adapter, max_tokens=12)
    assert before == shared.run.generate(QUESTION, max_tokens=12)
    for pair in adapter.pairs.values():
        pair.B.mul_(-3)
    changed = shared.model.generate(QUESTION, adapter=adapter, max_tokens=12)
    fresh = lk.load(shared.model.spec.path, dtype="float32")
    assert changed == fresh.generate(QUESTION, adapter=adapter, max_tokens=12) != before
    fresh.release()


def test_seeds_differ_by_prompt(shared: Shared) -> None:
    settings = {"max_tokens": 12, "temperature": 1.5, "seed": 3}
    one, two = shared.model.generate([QUESTION, QUESTION], **settings)
    assert one != two and [one, two] == shared.model.generate([QUESTION, QUESTION], **settings)


def test_a_raw_text_goes_on_as_it_is(shared: Shared) -> None:
    with shared.model.computing_with(None) as text:
        [ids] = sample(text, [text.tokenizer.encode("alder birch")], max_tokens=6, temperature=0)
    assert shared.model.generate("alder birch", raw=True, max_tokens=6) == text.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_under_a_budget_replies_are_the_same(shared: Shared, tiny_llama_folder: Path) -> None:
    model = lk.load(tiny_llama_folder, dtype="float32", budget="4GiB")
    assert model.generate(QUESTION, adapter=shared.run, max_tokens=8) == shared.run.generate(QUESTION, max_tokens=8)
    model.release()
    with pytest.raises(ConfigError, match="4KiB"):
        lk.load(tiny_llama_folder, dtype="float32", budget="4KiB").generate(QUESTION)


@pytest.mark.slow
def test_the_plan_shows_itself(shared: Shared) -> None:
    plan = shared.model.plan(lk.Lora(rank=4), rows=shared.rows)
    assert plan.peak > 0 and plan.fits is None and "Peak of the run" in str(plan)
    said = " ".join(str(plan).split())
    assert "with up to " in said and f"of {len(shared.rows.train)} rows in an epoch" in said
    assert plan._repr_html_().startswith("<p>Peak of the run: <b>")
    larger = shared.model.plan(lk.Lora(rank=4), tokens=100)
    assert larger.peak != plan.peak


def test_a_model_says_what_it_is(shared: Shared, tiny_llama_folder: Path) -> None:
    assert repr(lk.load(tiny_llama_folder, quantize="nf4", budget="2GiB")) == f"Model {tiny_llama_folder}, nf4, budget 2GiB"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": [None, None]}, "2 adapters for 1 prompts"),
        ({"adapter": 5}, r"adapter is 5 \(int\); expected a run, an adapter"),
        ({"adapter": "nowhere"}, "nowhere does not exist"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temprature": 1}, "no argument 'temprature'"),
        ({"prompt": [{"role": "usr", "content": "x"}]}, "A message of the prompt is"),
        ({"prompt": ["x" * 4000]}, "tokens; with at least one to write, at most 255 fit"),
    ],
)
def test_mistakes_are_one_message(shared: Shared, settings: dict[str, object], message: str) -> None:
    with pytest.raises(LorakeetError, match=message):
        shared.model.generate(**{"prompt": QUESTION, "max_tokens": 4, **settings})


def test_wrong_models_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        lk.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"quantize\.method in lk.load is 'nf5'"):
        lk.load(tmp_path, quantize="nf5")
    with pytest.raises(ConfigError, match="tokenizer= and folder= go with a model in memory"):
        lk.load(tmp_path, folder="x")


PROMPTS = ("alder birch", "cedar GOOD alder", "birch")


def at_once(calls: list[Callable[[], str]], *, by: str) -> list[str]:
    """What each call returns, all begun together in a thread each."""
    together = Barrier(len(calls))

    def begun(call: Callable[[], str]) -> str:
        together.wait(60)
        return call()

    async def gathered() -> list[str]:
        return list(await asyncio.gather(*(asyncio.to_thread(begun, call) for call in calls)))

    if by == "asyncio":
        return asyncio.run(gathered())
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begun, calls))


@pytest.mark.slow
@pytest.mark.parametrize("by", ["threads", "asyncio"])
@pytest.mark.parametrize("handles", [1, 3])
def test_threads_load_and_generate(shared: Shared, tiny_llama_folder: Path, handles: int, by: str) -> None:
    """Of three threads that loaded at once, two said "lacks 1 weights", and the process could load nothing any more."""
    expected = [shared.model.generate(prompt, adapter=shared.run, max_tokens=6) for prompt in PROMPTS]
    for _ in range(3):
        models = [lk.load(tiny_llama_folder, dtype="float32") for _ in range(handles)]
        calls = [
            lambda model=models[number % handles], prompt=prompt: model.generate(prompt, adapter=shared.run, max_tokens=6)
            for number, prompt in enumerate(PROMPTS)
        ]
        assert at_once(calls, by=by) == expected
        for model in models:
            model.release()


@pytest.mark.slow
def test_threads_that_stream_measure_and_choose_their_own_adapter(shared: Shared) -> None:
    model, prompt = shared.model, PROMPTS[0]
    alone, adapted = (model.generate(prompt, adapter=adapter, max_tokens=30) for adapter in (None, shared.run))
    losses = str(model.losses(shared.rows.held_out, adapter=shared.run).sum())

    def with_run() -> str:
        with model.using(shared.run):
            return model.generate(prompt, max_tokens=30)

    for _ in range(3):
        found = at_once(
            [
                lambda: "".join(model.stream(prompt, max_tokens=30)),
                with_run,
                lambda: model.generate(prompt, max_tokens=30),
                lambda: str(model.losses(shared.rows.held_out, adapter=shared.run).sum()),
            ],
            by="threads",
        )
        assert found == [alone, adapted, alone, losses]
