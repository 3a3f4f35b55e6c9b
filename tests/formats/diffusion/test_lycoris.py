"""LoHa and LoKr against their formulas written out entry by entry."""

from __future__ import annotations

import pytest
import torch

from lorakeet.formats.diffusion.lycoris import algorithm, is_dense, lycoris_delta, not_understood


def randoms(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_loha_is_the_product_of_two_products_entry_by_entry() -> None:
    slots = randoms(hada_w1_a=(5, 2), hada_w1_b=(2, 7), hada_w2_a=(5, 2), hada_w2_b=(2, 7))
    found = lycoris_delta(slots, 6.0)
    for row in range(5):
        for column in range(7):
            first = sum(slots["hada_w1_a"][row, k] * slots["hada_w1_b"][k, column] for k in range(2))
            second = sum(slots["hada_w2_a"][row, k] * slots["hada_w2_b"][k, column] for k in range(2))
            assert float(found[row, column]) == pytest.approx(float(3 * first * second), rel=1e-4)  # type: ignore[index]
    assert is_dense(slots) and algorithm(slots) == "LoHa"


def test_loha_of_a_convolution_in_tucker_form() -> None:
    factors = {"hada_w1_a": (2, 5), "hada_w1_b": (2, 4), "hada_w2_a": (2, 5), "hada_w2_b": (2, 4)}
    slots = randoms(hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3), **factors)
    found = lycoris_delta(slots, None)
    entry = 1.0
    for number in ("1", "2"):
        core, a, b = slots[f"hada_t{number}"], slots[f"hada_w{number}_a"], slots[f"hada_w{number}_b"]
        entry *= float(sum(core[i, j, 2, 1] * a[i, 3] * b[j, 0] for i in range(2) for j in range(2)))
    assert tuple(found.shape) == (5, 4, 3, 3) and float(found[3, 0, 2, 1]) == pytest.approx(entry, rel=1e-4)  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("shapes", "scale"),
    [
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5)}, 1.0),  # alpha counts for a product only
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}, 3.0),
        ({"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2": (4, 5)}, 3.0),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5, 3, 3)}, 3.0),
        ({"lokr_w1": (2, 3), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 5)}, 3.0),
    ],
)
def test_lokr_is_a_kronecker_product(shapes: dict[str, tuple[int, ...]], scale: float) -> None:
    slots = randoms(**shapes)
    found = lycoris_delta(slots, 6.0)
    w1 = slots["lokr_w1"] if "lokr_w1" in slots else slots["lokr_w1_a"] @ slots["lokr_w1_b"]
    if "lokr_t2" in slots:
        w2 = torch.einsum("ijkl,io,jn->onkl", slots["lokr_t2"], slots["lokr_w2_a"], slots["lokr_w2_b"])
    elif "lokr_w2" in slots:
        w2 = slots["lokr_w2"]
    else:
        w2 = torch.einsum("or,r...->o...", slots["lokr_w2_a"], slots["lokr_w2_b"])
    assert not isinstance(found, str) and tuple(found.shape[:2]) == (8, 15)
    for i, j, k, m in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 1)):
        torch.testing.assert_close(found[i * 4 + k, j * 5 + m], scale * w1[i, j] * w2[k, m], atol=1e-5, rtol=1e-4)
    assert algorithm(slots) == "LoKr"


def test_incomplete_and_crooked_tensors_are_described() -> None:
    assert "without hada_w2_b" in str(lycoris_delta(randoms(hada_w1_a=(5, 2), hada_w1_b=(2, 7), hada_w2_a=(5, 2)), 1.0))
    crooked = randoms(hada_w1_a=(5, 2), hada_w1_b=(3, 7), hada_w2_a=(5, 2), hada_w2_b=(2, 7))
    assert "shapes do not go together: hada_w1_a (5, 2)" in str(lycoris_delta(crooked, 1.0))
    assert not is_dense(randoms(lora_down=(2, 3)))


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 alpha", []),
        ("lokr_w1 lokr_w2 alpha", []),
        ("lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2", []),
        ("lokr_w1 lokr_w2 dora_scale", ["dora_scale"]),
        ("lokr_w1 lokr_w1_a lokr_w2 lokr_t2", ["lokr_t2", "lokr_w1_a"]),
        ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b lokr_w1 lora_up lora_down", ["lokr_w1", "lora_down", "lora_up"]),
    ],
)
def test_tensors_that_no_formula_uses_are_reported(names: str, extra: list[str]) -> None:
    assert not_understood(dict.fromkeys(names.split(), torch.ones(2, 2))) == extra
