"""Wrong settings of diffusion training are all named."""

from __future__ import annotations

from lorakeet.train.image_spec import DiffusionSpec


def test_the_defaults_can_be_used() -> None:
    assert DiffusionSpec().validate() == []


def test_what_is_left_out_is_the_models() -> None:
    found = DiffusionSpec().resolved("flow", 3.5)
    assert (found.prediction, found.timesteps, found.guidance) == ("flow", "logit-normal", 3.5)
    assert DiffusionSpec(guidance=0.0).resolved("epsilon", 7.5).guidance == 0.0
    assert DiffusionSpec(prediction="v_prediction").why_not("epsilon") and not DiffusionSpec(prediction="flow").why_not("flow")


def test_samples_on_the_way_need_seeds() -> None:
    assert DiffusionSpec(progress=True).validate() == []
    assert "diffusion.seeds is 0" in DiffusionSpec(progress=True, seeds=0).validate()[0]


def test_every_wrong_setting_is_named() -> None:
    found = DiffusionSpec(min_snr_gamma=-1, at_once=0, held_out_timesteps=0, sample_steps=0, seeds=-1, guidance=float("nan"))
    wrong = (
        "min_snr_gamma is -1",
        "at_once is 0",
        "held_out_timesteps is 0",
        "sample_steps is 0",
        "seeds is -1",
        "guidance is nan",
    )
    for name in wrong:
        assert any(f"diffusion.{name}" in message for message in found.validate()), name
