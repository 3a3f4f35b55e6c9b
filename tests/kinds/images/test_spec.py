"""Wrong settings of image data are all named."""

from __future__ import annotations

from lorakeet.kinds.images.spec import ImageSpec


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
