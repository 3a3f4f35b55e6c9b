"""`verbs.verify`: faithful artefacts pass in every form and precision; each usual mistake fails, with its cause named."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from lorakeet.cli.main import main
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import Check, read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.exporting.llama_cpp import quantise
from lorakeet.exporting.runtime_support import Runtime
from lorakeet.formats.gguf import permute, unpermute
from lorakeet.formats.peft import peft
from lorakeet.models.text.load import load_tokenizer
from lorakeet.serve.probe import read_record
from lorakeet.verbs.deployment import check_deployment
from lorakeet.verbs.options import VerifyOptions
from lorakeet.verbs.verify import verify
from tiny.adapters import random_adapter
from tiny.exports import loud_run, write_folder, write_lora, write_model
from tiny.models import FAMILIES, tiny_model
from tiny.runs import quiet

HEADS = {"q_proj": 4, "k_proj": 2}


@dataclass(frozen=True)
class Loud:
    """A run with a visible adapter, its base, and the base as a GGUF file."""

    path: Path
    model: Path
    adapter: Adapter
    base_gguf: Path
    quiet_adapter: Adapter  # of the run before it was made loud: an earlier state


@pytest.fixture(scope="module")
def loud(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Loud:
    folder = tmp_path_factory.mktemp("loud")
    path = loud_run(finished.path, folder / "run")
    base = write_model(finished.model, None, folder / "base.gguf")
    return Loud(path, finished.model, peft.read(path / "adapter"), base, peft.read(finished.path / "adapter"))


def failed(loud: Loud, artefact: Path, **more: Any) -> tuple[str, list[str]]:
    """The message, and which kinds of checks failed."""
    with pytest.raises(VerificationFailed) as caught:
        verify(VerifyOptions(str(loud.path), against=(str(artefact),), rows=3, **more), console=quiet())
    checks = read_certificate(loud.path / "certificate.json").checks
    return str(caught.value), [kind(check) for check in checks if not check.passed and artefact.name in check.name]


def kind(check: Check) -> str:
    return check.name.rpartition(": ")[2]


@pytest.mark.slow
def test_faithful_artefacts_pass_and_the_run_keeps_the_proof(loud: Loud, tmp_path: Path) -> None:
    run = Path(shutil.copytree(loud.path, tmp_path / "run"))
    before = len(read_certificate(run / "certificate.json").checks)
    merged = write_folder(loud.model, loud.adapter, tmp_path / "merged")
    files = [write_model(loud.model, loud.adapter, tmp_path / f"{quant}.gguf", quant) for quant in ("f32", "f16", "q8_0")]
    quantise(files[0], tmp_path / "q4_0.gguf", "q4_0")
    lora = write_lora(loud.model, loud.adapter, tmp_path / "lora.gguf")
    targets = tuple(map(str, (merged, *files, tmp_path / "q4_0.gguf", lora)))
    console = Console(file=(said := io.StringIO()), width=300)
    found = verify(VerifyOptions(str(run), against=targets, base_gguf=loud.base_gguf, rows=2), console=console)
    named = [line for line in said.getvalue().splitlines() if line.startswith("Comparing ")]
    assert named == [f"Comparing {Path(target).name} with the live adapter." for target in targets]
    assert found.to_mapping()["passed"] is True and found.exit_code == 0
    kept = read_certificate(run / "certificate.json")
    kinds = ["prompt ids", "logits", "answers", "greedy text", "weights"]
    names = [check.name for check in kept.checks]
    assert names[:4] == ["adapter on disk", "base untouched", "frozen weights", "trained = saved = loaded"]
    assert names[4].endswith(": logits") and "in PEFT" in names[4] and names[5] == "own code"
    assert len(names) == before + 6 * len(kinds)
    assert [kind(check) for check in kept.checks[before : before + 5]] == kinds
    answers = next(check for check in kept.checks[before:] if kind(check) == "answers")
    assert set(answers.estimates) == {"accuracy_live", "accuracy_there"}
    assert read_report(run / "report.json").certificate == kept
    assert "q8_0.gguf: weights" in (run / "report.html").read_text()
    verify(VerifyOptions(str(run), against=targets[:1], rows=2), console=quiet())
    assert len(read_certificate(run / "certificate.json").checks) == len(names)  # replaced, not doubled


@pytest.mark.slow
def test_a_wrong_file_is_held_against_itself_only_and_until_it_is_gone(loud: Loud, tmp_path: Path) -> None:
    run = Path(shutil.copytree(loud.path, tmp_path / "run"))
    for folder in ("good", "wrong"):
        (tmp_path / folder).mkdir()
    good = write_model(loud.model, loud.adapter, tmp_path / "good" / "model.gguf")
    wrong = write_model(loud.model, None, tmp_path / "wrong" / "model.gguf")
    with pytest.raises(VerificationFailed, match=r"wrong/model\.gguf: weights"):
        verify(VerifyOptions(str(run), against=(str(wrong),), rows=1), console=quiet())
    verify(VerifyOptions(str(run), against=(str(good),), rows=1), console=quiet())
    kept = read_certificate(run / "certificate.json")
    assert {check.artefact: check.passed for check in kept.checks if kind(check) == "weights"} == {
        "wrong/model.gguf": False,
        "good/model.gguf": True,
    }
    assert kept.passed and read_record(run / "certificate.json") is not None, "the adapter itself is served"
    assert kept.verdict == "The own checks passed; wrong/model.gguf failed"
    peft = f"adapter/ in PEFT {version('peft')}"
    artefacts = {peft: "proved", "wrong/model.gguf": "failed", "good/model.gguf": "proved"}
    assert json.loads((run / "certificate.json").read_text())["artefacts"] == artefacts
    page = (run / "report.html").read_text()
    assert "The own checks passed; wrong/model.gguf failed" in page and "certificate passed" in page
    wrong.unlink()
    verify(VerifyOptions(str(run), against=(str(good),), rows=1), console=quiet())
    kept = read_certificate(run / "certificate.json")
    assert kept.passed and {check.artefact for check in kept.checks} == {"", peft, "good/model.gguf"}


def changed(adapter: Adapter, change: Callable[[str, Pair], Pair | None]) -> Adapter:
    pairs = {path: new for path, pair in adapter.pairs.items() if (new := change(path, pair)) is not None}
    return dataclasses.replace(adapter, pairs=pairs)


def wrong_scale(loud: Loud) -> Adapter:
    return changed(loud.adapter, lambda _, pair: dataclasses.replace(pair, alpha=4.0))


def a_permuted(loud: Loud) -> Adapter:
    """What the writer makes of it has B as it was and A permuted."""

    def mix_up(path: str, pair: Pair) -> Pair:
        heads = HEADS.get(path.rpartition(".")[2], 0)
        if not heads:
            return pair
        return dataclasses.replace(pair, A=permute(pair.A.t().contiguous(), heads).t().contiguous(), B=unpermute(pair.B, heads))

    return changed(loud.adapter, mix_up)


def one_layer_dropped(loud: Loud) -> Adapter:
    return changed(loud.adapter, lambda path, pair: None if path == "model.layers.1.mlp.down_proj" else pair)


def swapped(loud: Loud) -> Adapter:
    return peft.read(loud_run(loud.path, loud.path.parent / "swapped", seed=5) / "adapter")


def stale(loud: Loud) -> Adapter:
    return loud.quiet_adapter


MUTATIONS = [
    (wrong_scale, "the scale; every matrix holds 0.3333 times the change. That is what comes out when alpha was ignored"),
    (a_permuted, "the permutation of q and k"),
    (one_layer_dropped, r"down_proj"),
    (swapped, "another adapter, or an earlier state of this one"),
    (stale, "another adapter, or an earlier state of this one"),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "lora"])
@pytest.mark.parametrize(("mutate", "cause"), MUTATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_each_mistake_fails_and_is_named(
    loud: Loud, tmp_path: Path, mutate: Callable[[Loud], Adapter], cause: str, form: str
) -> None:
    loud_copy = dataclasses.replace(loud, path=tmp_path / "run")
    loud_run(loud.path, loud_copy.path)
    peft_bytes = (loud.path / "adapter" / "adapter_model.safetensors").read_bytes()
    (loud_copy.path / "adapter" / "adapter_model.safetensors").write_bytes(peft_bytes)
    adapter = mutate(loud_copy)
    if form == "merged":
        said, kinds = failed(loud_copy, write_model(loud.model, adapter, tmp_path / "m.gguf"))
    else:
        said, kinds = failed(loud_copy, write_lora(loud.model, adapter, tmp_path / "l.gguf"), base_gguf=loud.base_gguf)
    assert {"logits", "weights"} <= set(kinds) and cause.replace("down_proj", "down") in said.replace("down_proj", "down")
    assert "The worst layer is " in said and ("first diverging token" in said) == ("greedy text" in kinds)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_few_bits_hide_no_mistake(loud: Loud, tmp_path: Path, quant: str) -> None:
    half = changed(loud.adapter, lambda _, pair: dataclasses.replace(pair, alpha=6.0))
    wide = write_model(loud.model, half, tmp_path / "wide.gguf")
    quantise(wide, tmp_path / "few.gguf", quant)
    said, kinds = failed(loud, tmp_path / "few.gguf")
    assert "weights" in kinds and "the scale; every matrix holds 0." in said


@pytest.mark.slow
def test_a_doubled_begin_token_fails(loud: Loud, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(loud.model)
    bos = tokenizer.bos_token
    added = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = added
    said, kinds = failed(loud, write_model(loud.model, loud.adapter, tmp_path / "bos.gguf", tokenizer=tokenizer))
    assert kinds == ["prompt ids"] and "BOS is doubled or added" in said


@pytest.mark.slow
def test_another_template_fails(loud: Loud, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(loud.model)
    tokenizer.chat_template = tokenizer.chat_template.replace("'\\n' }}{%", "': ' }}{%", 1)
    said, kinds = failed(loud, write_model(loud.model, loud.adapter, tmp_path / "t.gguf", tokenizer=tokenizer))
    assert kinds == ["prompt ids"] and "Likely cause: the chat template or the pre-tokenizer differs" in said


@pytest.mark.slow
def test_the_command_ends_with_3_and_without_artefacts_with_2(
    loud: Loud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(loud.path), "--against", str(loud.base_gguf), "--rows", "2", "--json"]) == 3
    assert "the adapter is not in it at all" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main(["verify", str(loud.path), "--json"]) == 2
    assert "There is nothing to compare" in json.loads(capsys.readouterr().out)["error"]["message"]
    with pytest.raises(ConfigError, match="does not exist"):
        verify(VerifyOptions(str(loud.path), against=(str(tmp_path / "gone.gguf"),)), console=quiet())
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"rows\.jsonl is no GGUF file; expected a merged folder, a \.gguf file or an http"):
        verify(VerifyOptions(str(loud.path), against=(str(tmp_path / "rows.jsonl"),)), console=quiet())
    with pytest.raises(ConfigError, match="name the GGUF file of its base"):
        verify(
            VerifyOptions(str(loud.path), against=(str(write_lora(loud.model, loud.adapter, tmp_path / "l.gguf")),)),
            console=quiet(),
        )


def run_file(room: Path, lora: str, family: str = "llama", more: str = "", **changes: Any) -> Path:
    """A run file whose model is a config.json and nothing else."""
    model = room / family
    model.mkdir(exist_ok=True)
    kind = {"model_type": family, **FAMILIES[family][2], **changes}
    (model / "config.json").write_text(json.dumps(kind))
    path = room / "plan.yaml"
    path.write_text(f"model: {model}\ndata: rows.jsonl\nlora: {lora}\n{more}")
    return path


def loads(path: Path, runtime: Runtime, **more: Any) -> set[str]:
    return set(check_deployment(path, runtime, quiet(), **more).features)


def test_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = run_file(tmp_path, "{rank: 24, variant: dora, target_modules: [q_proj], extra_modules: [lm_head]}")
    assert main(["verify", str(plan), "--deploy", "vllm", "--json"]) == 3
    said = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "would not load rightly in vllm" in said and "DoRA is refused" in said and "whole modules is refused" in said
    assert main(["verify", str(plan), "--deploy", "peft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == ["DoRA", "rank above 16", "whole modules"]
    with pytest.raises(VerificationFailed, match="Export the merged model"):
        check_deployment(plan, "llama.cpp", quiet())


def test_ranks_that_are_yet_to_be_chosen_will_differ(tmp_path: Path) -> None:
    plan = run_file(tmp_path, "{rank: 8}", more="ranks: {choose: auto, max_rank: 16}\n")
    with pytest.raises(VerificationFailed, match=r"several scales is computed wrongly.*\(ranks\.choose given\), or merge"):
        check_deployment(plan, "vllm", quiet())
    assert loads(plan, "llama.cpp") == {"several ranks", "several scales"}


@pytest.mark.parametrize(
    ("setting", "found"), [("continue_from", {"rank above 16"}), ("on_top_of", {"rank above 16", "several ranks"})]
)
def test_the_ranks_of_an_earlier_adapter_count(tmp_path: Path, setting: str, found: set[str]) -> None:
    path = "model.layers.0.self_attn.q_proj"
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    peft.write(Adapter({path: Pair(torch.ones(20, 64), torch.ones(64, 20), 20.0)}, base="model"), earlier)
    plan = run_file(tmp_path, f"{{rank: 4, alpha: 4, target_modules: [q_proj], {setting}: {earlier}}}")
    assert loads(plan, "peft") == found


def test_ranks_that_will_fall_will_differ(tmp_path: Path) -> None:
    plan = run_file(tmp_path, "{rank: 8}", more="ranks: prune\n")
    assert "several ranks" in loads(plan, "llama.cpp")


@pytest.mark.parametrize("target", ["all-linear", "gate_up_proj"])
def test_experts_are_found_among_the_targets(tmp_path: Path, target: str) -> None:
    plan = run_file(tmp_path, f"{{rank: 4, target_modules: [{target}]}}", "mixtral")
    for runtime in ("vllm", "llama.cpp", "ollama"):
        with pytest.raises(VerificationFailed, match="expert pairs is "):
            check_deployment(plan, runtime, quiet())
    assert loads(plan, "peft") == {"expert pairs"}
    assert loads(run_file(tmp_path, "{rank: 4, target_modules: [attention]}", "mixtral"), "vllm") == set()


def test_only_a_tied_head_is_refused(tmp_path: Path) -> None:
    asked = "{rank: 4, target_modules: [q_proj, lm_head]}"
    assert loads(run_file(tmp_path, asked), "llama.cpp") == set()
    with pytest.raises(VerificationFailed, match="tied head pairs is refused"):
        check_deployment(run_file(tmp_path, asked, tie_word_embeddings=True), "llama.cpp", quiet())


def test_settings_that_do_not_fit_the_model_or_no_model_are_said(tmp_path: Path) -> None:
    plan = run_file(tmp_path, "{target_modules: [nonsense]}")
    with pytest.raises(ConfigError, match="No module matches target 'nonsense'"):
        check_deployment(plan, "peft", quiet())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no configuration that could be read"):
        check_deployment(plan, "peft", quiet(), base=str(tmp_path / "empty"))


def test_pictures_are_planned_from_their_pipeline(tiny_sd_folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"kind: image\nmodel: {tiny_sd_folder}\ndata: photos\nlora: {{rank: 4, target_modules: [attention, conv]}}\n")
    assert loads(plan, "peft") == {"convolution pairs"}
    with pytest.raises(VerificationFailed, match="convolution pairs is refused"):
        check_deployment(plan, "vllm", quiet())


def test_after_training(finished: Any) -> None:
    for runtime in get_args(Runtime):
        found = check_deployment(finished.path, runtime, quiet())
        assert found.to_mapping() == {"runtime": runtime, "loads": True, "features": [], "notes": []} and found.exit_code == 0


def test_the_base_of_a_finished_adapter_says_whether_its_head_is_tied(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model("llama"), "lm_head")
    peft.write(Adapter(adapter.pairs), tmp_path / "adapter")
    assert loads(tmp_path / "adapter", "vllm") == set(), "no base is asked for where it makes no difference"
    with pytest.raises(ConfigError, match="name it with --base"):
        check_deployment(tmp_path / "adapter", "llama.cpp", quiet())
    run_file(tmp_path, "{}")
    assert loads(tmp_path / "adapter", "llama.cpp", base=str(tmp_path / "llama")) == set()
    run_file(tmp_path, "{}", tie_word_embeddings=True)
    with pytest.raises(VerificationFailed, match="tied head pairs is refused"):
        check_deployment(tmp_path / "adapter", "llama.cpp", quiet(), base=str(tmp_path / "llama"))
