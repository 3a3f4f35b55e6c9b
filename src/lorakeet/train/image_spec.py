"""`ImageSpec`, the `images` part of a run file: size, crops, captions, near-duplicates. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lorakeet.setting import setting


@dataclass(frozen=True)
class ImageSpec:
    """How pictures become training examples, in a run with kind: image."""

    resolution: int | None = setting(None, "Side of a square example in pixels; by default the model's own.")
    buckets: bool = setting(True, "Bucket pictures by aspect ratio; if false, every example is a square.")
    bucket_step: int | None = setting(
        None, "Sides of examples are multiples of this many pixels; by default what the model requires."
    )
    crops: int = setting(1, "Crops per picture: the first from its centre, the others at positions drawn once.")
    flip: bool = setting(False, "Also train on mirrored pictures; not for text, faces or anything one-sided.")
    caption: str = setting("", "Caption of pictures without their own, such as 'a photo of sks dog'.")
    caption_dropout: float = setting(0.1, "Share of training examples without caption, as classifier-free guidance requires.")
    prior: str = setting("", "Folder of pictures of the subject's class, trained on as well so that the class is preserved.")
    prior_caption: str = setting(
        "", "Caption of the class pictures, such as 'a photo of a dog'; without a folder the base generates them."
    )
    prior_count: int = setting(100, "Number of class pictures that the base generates.")
    smallest: int = setting(32, "Leave out pictures with a side below this many pixels; 0 keeps all.")
    near_duplicates: int = setting(
        8, "Bits of a 256-bit hash in which a copy may differ, before pixels are compared; 0 finds equal ones only."
    )
    cache: str = setting("", "Folder for cached latents and text embeddings; by default the user's cache folder.")

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        found: list[str] = []
        for name, least in (("resolution", 8), ("bucket_step", 1), ("crops", 1), ("smallest", 0), ("near_duplicates", 0),
                            ("prior_count", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"images.{name} is {value}; it must be {least} or more.")
        if self.near_duplicates > 64:
            bits = self.near_duplicates
            found.append(f"images.near_duplicates is {bits} of 256 bits; above 64 most pictures count as duplicates. Use 8.")
        if not 0 <= self.caption_dropout < 1:
            found.append(f"images.caption_dropout is {self.caption_dropout:g}; it must be at least 0 and below 1, such as 0.1.")
        return found
