from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lorakeet.errors import DataError
from lorakeet.evaluate.parity import TOLERANCES, ParityMeter, Tolerance, kl_lower_bound
from lorakeet.evaluate.spec import EvaluateSpec

QUICK = EvaluateSpec(resamples=300)


def logits(tokens: int = 90, vocabulary: int = 50, *, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_measures_equal_their_definitions() -> None:
    left, right, targets = logits(), logits() + 0.3 * logits(seed=1), torch.arange(90) % 50
    meter = ParityMeter()
    meter.add(left, right, targets=targets)
    found = meter.result(QUICK)
    p, q = left.double().log_softmax(1), right.double().log_softmax(1)
    assert found.max_logit_difference == pytest.approx(float((left - right).abs().max()), rel=1e-6)
    assert found.mean_kl.value == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()))
    assert found.top1_agreement.value == pytest.approx(float((left.argmax(1) == right.argmax(1)).double().mean()))
    index = torch.arange(90)
    assert found.loss_difference is not None
    assert found.loss_difference.value == pytest.approx(float((p[index, targets] - q[index, targets]).mean()))
    assert found.tokens == 90 and found.non_finite == 0


def test_chunks_give_the_same_as_one_piece() -> None:
    left, right, targets = logits(), logits(seed=2), torch.zeros(90, dtype=torch.long)
    texts = [row // 30 for row in range(90)]
    whole, parts = ParityMeter(), ParityMeter()
    whole.add(left, right, targets=targets, texts=texts)
    for start in range(0, 90, 30):
        part = slice(start, start + 30)
        parts.add(left[part], right[part], targets=targets[part], texts=start // 30)
    assert whole.result(QUICK) == parts.result(QUICK)
    assert "over 3 groups" in whole.result(QUICK).mean_kl.method


def test_identical_logits_differ_by_nothing_even_where_masked() -> None:
    left = logits()
    left[:, 7] = -math.inf
    meter = ParityMeter()
    meter.add(left, left.clone())
    found = meter.result(QUICK)
    assert (found.max_logit_difference, found.mean_kl.value, found.top1_agreement.value, found.non_finite) == (0.0, 0.0, 1.0, 0)
    assert found.check("same", TOLERANCES["fp32"], between=("a", "b")).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_fails_any_tolerance(value: float) -> None:
    right = logits()
    right[3, 4] = value
    meter = ParityMeter()
    meter.add(logits(), right)
    check = meter.result(QUICK).check("broken", Tolerance(1e9, 1e9, 0.0, 1e9, 1e9), between=("a", "b"))
    assert not check.passed and check.exceeded() == ("non_finite",)


def lora_logits(*, scale: float, merged: bool, dtype: torch.dtype) -> torch.Tensor:
    """Logits of W x + scale·B·A·x, or of (W + scale·B·A) x, with rank 4; alpha 12 makes the true scale 3."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(200, 64, generator=generator), torch.randn(100, 64, generator=generator) / 8
    a, b = torch.randn(4, 64, generator=generator) / 8, torch.randn(100, 4, generator=generator) / 50
    x, weight, a, b = (tensor.to(dtype) for tensor in (x, weight, a, b))
    if merged:
        return x @ (weight.float() + scale * (b.float() @ a.float())).to(dtype).T
    return x @ weight.T + scale * ((x @ a.T) @ b.T)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_true_merge_passes_and_a_lost_alpha_fails(precision: str, dtype: torch.dtype) -> None:
    live, base = lora_logits(scale=3, merged=False, dtype=dtype), lora_logits(scale=0, merged=False, dtype=dtype)
    effect = ParityMeter()
    effect.add(live, base)
    results = []
    for scale in (3.0, 1.0):
        meter = ParityMeter()
        meter.add(live, lora_logits(scale=scale, merged=True, dtype=dtype), targets=torch.zeros(200, dtype=torch.long))
        parity = meter.result(QUICK)
        results.append(parity.check("merge", TOLERANCES[precision], between=("live", "merged"), base=effect.result(QUICK)))  # type: ignore[index]
    assert results[0].passed, str(results[0])
    assert not results[1].passed and "effect" in results[1].exceeded()


def test_wrong_use_is_refused() -> None:
    meter = ParityMeter()
    with pytest.raises(DataError, match="No tokens"):
        meter.result(QUICK)
    with pytest.raises(DataError, match=r"\(90, 50\) and \(90, 49\)"):
        meter.add(logits(), logits(vocabulary=49))
    with pytest.raises(DataError, match="2 text ids for 90 tokens"):
        meter.add(logits(), logits(), texts=[1, 2])
    meter.add(logits(), logits())
    with pytest.raises(DataError, match="Targets were given for some chunks"):
        meter.add(logits(), logits(), targets=torch.zeros(90, dtype=torch.long))


def test_tolerances_widen_with_roundoff_and_are_explained() -> None:
    for name in ("logit", "mean_kl", "loss"):
        fp32, fp16, bf16 = (getattr(TOLERANCES[precision], name) for precision in ("fp32", "fp16", "bf16"))  # type: ignore[index]
        assert fp32 < fp16 < bf16
    assert all(field.metadata["help"] for field in dataclasses.fields(Tolerance))
    assert "certify in fp32" in (Tolerance.__doc__ or "")


def test_kl_over_given_tokens_is_a_lower_bound_that_all_tokens_reach() -> None:
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(50, generator=generator, dtype=torch.float64).mul(3).log_softmax(0) for _ in range(2))
    whole = float((p.exp() * (p - q)).sum())
    likely = q.topk(50).indices.tolist()
    found = [kl_lower_bound(p, {token: float(q[token]) for token in likely[:count]}) for count in (1, 5, 20, 50)]
    assert found == sorted(found) and found[-1] == pytest.approx(whole, rel=1e-9) and 0 < found[0] < whole
    assert kl_lower_bound(p, {token: float(p[token]) for token in likely[:5]}) == pytest.approx(0.0, abs=1e-12)
