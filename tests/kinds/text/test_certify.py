"""A run's certificate fails for another adapter on disk, and for a base that training changed by one bit."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.peft import peft
from lorakeet.kinds.certify_pairs import PAIRS
from lorakeet.kinds.text.certify import OWN_CODE, certify_text, check_frozen, rows_to_compare, with_own_code
from lorakeet.models.inject import adapter_names
from lorakeet.models.text.by_peft import IN_PEFT
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.model import TextModel
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.train.text.own_code import OwnCodeDifference
from tiny.runs import quiet

SPEC = EvaluateSpec(resamples=100)


@pytest.fixture
def live(finished: Any) -> TextModel:
    return open_adapter(finished.path).text_model(quiet(), dtype="float32")


def certified(finished: Any, live: TextModel, adapter: Path, *, before: dict[str, str], twice: bool = True) -> dict[str, bool]:
    model = finished.result.setup.config.model if twice else None
    rows = finished.result.setup.held_out.examples
    found = certify_text(live, adapter, rows, before=before, model=model, spec=SPEC, name=NAME)
    assert adapter_names(live.model) == [NAME]
    return {IN_PEFT if IN_PEFT in check.name else check.name: check.passed for check in found.checks}


def test_the_run_itself_has_all_checks(finished: Any) -> None:
    checks = finished.result.report.certificate.checks
    own = ["adapter on disk", "base untouched", "frozen weights", PAIRS]
    assert [check.name for check in checks] == [*own, f"adapter/ in PEFT {version('peft')}: logits", "own code"]
    assert all(check.passed for check in checks) and checks[1].measured["logit"] == 0 and checks[2].n > 20
    assert 0 < checks[5].measured["largest_gradient_difference"] < 1e-4 and checks[5].n > 20
    assert checks[5].measured["loss_difference"] < 1e-4


def test_what_was_not_compared_with_the_model_s_own_code_says_so(finished: Any) -> None:
    certificate = finished.result.report.certificate
    assert with_own_code(certificate, None).facts[OWN_CODE] == "not compared, for want of memory"
    rounded = OwnCodeDifference(rows=2, tokens=64, loss=0.1, gradient=2.0, median=True, worst="x", exact=False)
    assert with_own_code(certificate, rounded).checks[-1].measured == {"median_gradient_difference": 2.0}
    sure = replace(rounded, sure=True)
    assert with_own_code(certificate, sure).facts[OWN_CODE] == "not compared: the base predicts every token" and sure.passed


@pytest.mark.parametrize("twice", [True, False])
def test_another_adapter_on_disk_is_found(finished: Any, live: TextModel, tmp_path: Path, twice: bool) -> None:
    before = frozen_digests(live.model)
    same = certified(finished, live, finished.path / "adapter", before=before, twice=twice)
    assert all(same.values()) and len(same) == (5 if twice else 3)
    adapter = peft.read(finished.path / "adapter")
    adapter.pairs[next(iter(adapter.pairs))].B.mul_(1.01)
    peft.write(Adapter(adapter.pairs, base="x"), tmp_path / "adapter")
    other = certified(finished, live, tmp_path / "adapter", before=before, twice=twice)
    assert other == {**same, "adapter on disk": False, PAIRS: False}


def test_a_base_that_training_changed_is_found(finished: Any, live: TextModel) -> None:
    before = frozen_digests(live.model)
    with torch.no_grad():
        live.model.get_parameter("model.norm.weight").mul_(1.001)
    found = certified(finished, live, finished.path / "adapter", before=before)
    changed = {"adapter on disk": False, "base untouched": False, "frozen weights": False}
    assert found == {**changed, PAIRS: True, IN_PEFT: True}


def test_one_bit_is_enough_for_the_digests(live: TextModel) -> None:
    before = frozen_digests(live.model)
    weight = live.model.get_parameter("model.layers.1.input_layernorm.weight")
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    check = check_frozen(before, frozen_digests(live.model))
    assert not check.passed and check.measured["changed_tensors"] == 1
    assert check.detail == "Training changed model.layers.1.input_layernorm.weight."


def test_whole_rows_have_every_token_but_the_first_as_target(finished: Any) -> None:
    rows = finished.result.setup.held_out.examples
    chosen = rows_to_compare(rows, len(rows[0].ids) + len(rows[1].ids))
    assert len(chosen) == 2 and all(np.flatnonzero(~row.supervised).tolist() == [0] for row in chosen)
    assert len(rows_to_compare(rows, 1)) == 1
