"""Wrong settings of image data are all named."""

from __future__ import annotations

from lorakeet.kinds.images.spec import DiffusionSpec, ImageSpec


def test_the_defaults_can_be_used() -> None:
    assert ImageSpec().validate() == []


def test_every_wrong_setting_is_named() -> None:
    found = ImageSpec(resolution=4, crops=0, caption_dropout=1.0, near_duplicates=100, smallest=-1, bucket_step=0).validate()
    wrong = (
        "resolution is 4",
        "crops is 0",
        "caption_dropout is 1",
        "near_duplicates is 100",
        "smallest is -1",
        "bucket_step is 0",
    )
    for name in wrong:
        assert any(f"images.{name}" in message for message in found), name


def test_the_defaults_of_noise_and_samples_can_be_used() -> None:
    assert DiffusionSpec().validate() == []


def test_what_is_left_out_is_the_models() -> None:
    found = DiffusionSpec().resolved("flow", 3.5)
    assert (found.prediction, found.timesteps, found.guidance) == ("flow", "logit-normal", 3.5)
    assert DiffusionSpec(guidance=0.0).resolved("epsilon", 7.5).guidance == 0.0
    assert DiffusionSpec(prediction="v_prediction").why_not("epsilon") and not DiffusionSpec(prediction="flow").why_not("flow")


def test_samples_on_the_way_need_seeds() -> None:
    assert DiffusionSpec(progress=True).validate() == []
    assert "diffusion.seeds is 0" in DiffusionSpec(progress=True, seeds=0).validate()[0]


def test_every_wrong_setting_of_noise_and_samples_is_named() -> None:
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
