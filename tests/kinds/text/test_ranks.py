"""`--ranks auto`: the chosen ranks as an ordinary run file, the map in the report, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.cli.main import main
from lorakeet.config import read_run
from lorakeet.data.pack import micro_batches
from lorakeet.errors import ConfigError, DataError
from lorakeet.kinds.text import ranks as choosing
from lorakeet.kinds.text.assemble import add_pairs, assemble_text, text_task
from lorakeet.kinds.text.ranks import choose_ranks, start_directions
from lorakeet.models import modules
from lorakeet.models.inject import adapter_names
from lorakeet.ranks.allocate import pair_parameters
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.options import FinetuneOptions
from tiny.runs import QUICK, adapter_bytes, quiet, settings

pytestmark = pytest.mark.slow  # they share what takes seconds to make

AUTO = {"ranks": "auto", "ranks.max_rank": 12}


@pytest.fixture(scope="module")
def chosen(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("chosen") / "run"
    return finetune(settings(finished.model, finished.data, out, AUTO), FinetuneOptions(budget="3000"), console=quiet())


def test_the_saved_run_file_says_the_ranks_and_gives_the_same_run(chosen: Any, tmp_path: Path) -> None:
    run, plan = chosen.run, chosen.setup.plan
    assert 2900 < pair_parameters(plan) <= 3000 and len({entry.rank for entry in plan.entries}) > 2
    saved = read_run(run.config, {"out": str(tmp_path / "again")})
    assert saved.ranks.choose == "given" and saved.ranks.budget is None
    assert finetune(saved, FinetuneOptions(dry_run=True), console=quiet()).setup.plan == plan
    finetune(saved, console=quiet())
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(run.path)


def test_a_dry_run_and_a_resumed_run_agree(chosen: Any, finished: Any, tmp_path: Path) -> None:
    again = settings(finished.model, finished.data, tmp_path / "dry", {**AUTO, "ranks.budget": "3k"})
    dry = finetune(again, FinetuneOptions(dry_run=True), console=quiet())
    assert dry.setup.plan == chosen.setup.plan and not (tmp_path / "dry").exists()
    assert dry.to_mapping()["rank_pattern"] == chosen.setup.config.lora.rank_pattern, "which can be edited and given"
    before = adapter_bytes(chosen.run.path)
    finetune(read_run(chosen.run.config), FinetuneOptions(resume=chosen.run.path), console=quiet())
    assert adapter_bytes(chosen.run.path) == before


def test_the_command_line_prints_ranks_that_can_be_edited_and_given(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [word for key, value in QUICK.items() for word in (f"--{key}", value)]
    command = ["finetune", "--model", str(finished.model), "--data", str(finished.data), "--out", str(tmp_path / "run"), *quick]
    assert main([*command, "--ranks", "auto", "--budget", "3000", "--dry-run", "--json"]) == 0
    pattern = json.loads(capsys.readouterr().out)["rank_pattern"]
    assert pattern and not (tmp_path / "run").exists()
    edited = ",".join(f"{path}={rank}" for path, rank in {**pattern, next(iter(pattern)): 1}.items())
    assert main([*command, "--lora.rank_pattern", edited, "--dry-run", "--json"]) == 0
    ranks = {entry["path"]: entry["rank"] for entry in json.loads(capsys.readouterr().out)["plan"]["entries"]}
    assert ranks[next(iter(pattern))] == 1 and all(ranks[path] == rank for path, rank in list(pattern.items())[1:])


def test_the_report_has_a_map_of_layer_and_matrix(chosen: Any, finished: Any) -> None:
    ranks = chosen.report.ranks
    assert ranks.layers == ("0", "1") and len(ranks.matrices) == 7
    assert {(cell.layer, cell.matrix): cell.rank for cell in ranks.cells} == {
        (entry.path.split(".")[2], entry.path.split(".", 3)[3]): entry.rank for entry in chosen.setup.plan.entries
    }
    page = chosen.run.page.read_text()
    assert "Ranks by layer" in page and f">{ranks.highest}</td>" in page
    assert finished.result.report.ranks is None and "Ranks by layer" not in (finished.path / "report.html").read_text()


@pytest.mark.parametrize("score", ["gradient", "activation", "sensitivity"])
def test_scoring_leaves_the_model_as_it_was(finished: Any, tmp_path: Path, score: str) -> None:
    config = settings(finished.model, finished.data, tmp_path / "run")
    setup = assemble_text(config, quiet())
    before = [(path, type(module)) for path, module in setup.text.model.named_modules()]
    weights = {name: weight.clone() for name, weight in setup.text.model.state_dict().items()}
    auto = settings(finished.model, finished.data, tmp_path / "run", {**AUTO, "ranks.score": score})
    state = torch.random.get_rng_state()
    found, plan = choose_ranks(auto, setup.text, setup.plan, setup.train.examples, quiet())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert adapter_names(setup.text.model) == [] and [(p, type(m)) for p, m in setup.text.model.named_modules()] == before
    assert all(torch.equal(weight, weights[name]) for name, weight in setup.text.model.state_dict().items())
    assert not any(module._forward_hooks for _, module in modules.original_modules(setup.text.model))
    assert 0.97 * pair_parameters(setup.plan) < pair_parameters(plan) <= pair_parameters(setup.plan)
    assert found.lora.rank == 4 and found.lora.rank_pattern and {e.alpha for e in plan.entries} == {12.0}


@pytest.mark.parametrize(
    ("changes", "budget", "words"),
    [
        ({}, "100", ["budget of 100 parameters is below rank 1 for each of the 14 targets"]),
        ({}, "9M", ["9,000,000 parameters is above the full rank"]),
        ({"ranks.max_rank": 2}, "3000", ["highest measured rank", "ranks.max_rank"]),
        ({}, "a lot", ["ranks.budget is 'a lot'", "1.5M"]),
        ({"ranks": "given"}, "3000", ["Add --ranks auto"]),
    ],
)
def test_budgets_that_cannot_be_spent(
    finished: Any, tmp_path: Path, changes: dict[str, Any], budget: str, words: list[str]
) -> None:
    config = settings(finished.model, finished.data, tmp_path / "run", {**AUTO, **changes})
    with pytest.raises(ConfigError) as caught:
        finetune(config, FinetuneOptions(budget=budget), console=quiet())
    assert all(word in str(caught.value) for word in words) and not (tmp_path / "run").exists()


def test_ranks_that_are_given_twice_are_refused(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ranks\.choose is auto, but lora\.rank_pattern gives 1 ranks"):
        settings(finished.model, finished.data, tmp_path / "run", {**AUTO, "lora.rank_pattern": "q_proj=8"})


def test_scores_that_are_no_numbers_are_refused(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = assemble_text(settings(finished.model, finished.data, tmp_path / "run"), quiet())
    with torch.no_grad():
        setup.text.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    auto = settings(finished.model, finished.data, tmp_path / "run", AUTO)
    with pytest.raises(DataError, match=r"are not finite \(of 14 matrices\)"):
        choose_ranks(auto, setup.text, setup.plan, setup.train.examples, quiet())
    with pytest.raises(DataError, match=r"ranks\.choose auto needs 2 training rows or more; there are 1"):
        choosing.choose_ranks(auto, setup.text, setup.plan, setup.train.examples[:1], quiet())


def test_a_pair_on_the_output_layer_begins_along_the_states_that_it_sees(finished: Any, tmp_path: Path) -> None:
    """Those from which a token is learnt; a pass up to the last states never calls the layer itself."""
    head = {"lora.start": "activation", "lora.target_modules": "q_proj,lm_head"}
    setup = assemble_text(settings(finished.model, finished.data, tmp_path / "run", head), quiet())
    found = start_directions(setup.config, setup.text, setup.plan, setup.train.examples)["lm_head"]
    rows = choosing._rows(setup.config, setup.text, setup.train.examples, "")
    with torch.no_grad():
        states = torch.cat([setup.text.hidden(batch) for batch in micro_batches(rows, 512)])
    leading = torch.linalg.svd(states.float(), full_matrices=False).Vh[:4]
    assert (3**0.5 * found @ leading.t()).square().sum() / 4 > 0.9


def test_what_a_pair_begins_with_is_measured_beside_other_adapters_too(finished: Any, tmp_path: Path) -> None:
    """Where products are of another dtype than weights, adapted layers leave their own modules out: those would see no token."""
    mixed = {"lora.start": "activation", "model.dtype": "bfloat16", "model.products": "float32"}
    setup = assemble_text(settings(finished.model, finished.data, tmp_path / "run", mixed), quiet())
    first = start_directions(setup.config, setup.text, setup.plan, setup.train.examples)
    add_pairs(setup, setup.plan, seed=0, name="one")
    again = start_directions(setup.config, setup.text, setup.plan, setup.train.examples)
    for path, A in first.items():
        shared = (3 * A @ again[path].t()).square().sum() / len(A)  # 1 where both span the same, 4 of 32 by chance
        assert shared > 0.9, (path, shared)


@pytest.mark.parametrize("start", ["gradient", "activation"])
def test_pairs_begin_along_what_was_measured_and_resume_to_the_same_bytes(finished: Any, tmp_path: Path, start: str) -> None:
    config = settings(finished.model, finished.data, tmp_path / "run", {"lora.start": start, "train.steps": 4})
    setup = assemble_text(config, quiet())
    found = start_directions(setup.config, setup.text, setup.plan, setup.train.examples)
    task = text_task(setup)
    for entry in setup.plan.entries:
        A, B = (task.parameters()[f"{entry.path}.{name}"] for name in "AB")
        assert torch.equal(A, found[entry.path]) and not B.any()
        torch.testing.assert_close(A @ A.t(), torch.eye(4) / 3, rtol=1e-3, atol=1e-3)
    done = finetune(config, console=quiet())
    before = adapter_bytes(done.run.path)
    for kept in ("step-000004", None):  # from an older checkpoint, and from none
        for path in done.run.checkpoints.iterdir():
            if kept is None or path.name == kept:
                shutil.rmtree(path)
        finetune(read_run(done.run.config), FinetuneOptions(resume=done.run.path), console=quiet())
        assert adapter_bytes(done.run.path) == before


def test_starts_that_are_measured_need_linear_layers_and_a_model_in_memory(finished: Any, tmp_path: Path) -> None:
    changes = {"lora.start": "gradient", "lora.target_modules": "q_proj,embed_tokens"}
    with pytest.raises(ConfigError, match=r"lora\.start gradient is for linear layers, not for embedding weights"):
        assemble_text(settings(finished.model, finished.data, tmp_path / "run", changes), quiet())
    setup = assemble_text(settings(finished.model, finished.data, tmp_path / "run", {"lora.start": "activation"}), quiet())
    streamed = replace(setup.text, streamed=object())
    with pytest.raises(ConfigError, match=r"lora\.start activation reads .* memory\.budget streams this one"):
        start_directions(setup.config, streamed, setup.plan, setup.train.examples)
