"""The settings of image data: size, crops, captions, and what counts as the same picture. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ImageSpec:
    """How pictures become training examples: the `images` part of a run file, used with kind: image."""

    resolution: int | None = field(
        default=None, metadata={"help": "Side in pixels of a square example; left out, the one that the model was made for."}
    )
    buckets: bool = field(
        default=True, metadata={"help": "Keep a picture's shape, rounded to one of a few; off, every example is a square."}
    )
    bucket_step: int | None = field(
        default=None, metadata={"help": "Sides of examples are multiples of it, in pixels; left out, what the model can halve."}
    )
    crops: int = field(
        default=1, metadata={"help": "Cut-outs of each picture: the first from its middle, others from places drawn once."}
    )
    flip: bool = field(
        default=False, metadata={"help": "Train on the mirrored picture as well; not for text, faces or anything one-sided."}
    )
    caption: str = field(
        default="", metadata={"help": "Caption of pictures without one of their own, such as 'a photo of sks dog'."}
    )
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of training examples that are seen without caption, which guidance needs."}
    )
    prior: str = field(
        default="",
        metadata={"help": "Folder of pictures of the subject's kind, learnt beside it so that the kind is kept."},
    )
    prior_caption: str = field(
        default="", metadata={"help": "Caption of these, such as 'a photo of a dog'; without a folder the base draws them."}
    )
    prior_count: int = field(default=100, metadata={"help": "How many pictures of the kind the base draws."})
    smallest: int = field(
        default=32, metadata={"help": "Pictures with a side below so many pixels are left out, and named; 0 takes all."}
    )
    near_duplicates: int = field(
        default=8,
        metadata={"help": "Bits of a 256-bit hash by which a copy may differ before its pixels decide; 0 finds equal ones only."},
    )
    cache: str = field(
        default="", metadata={"help": "Folder in which latents and text embeddings are kept; left out, the user's cache folder."}
    )

    def validate(self) -> list[str]:
        """Every problem of these settings in words; empty when they can be used."""
        found: list[str] = []
        for name, least in (("resolution", 8), ("bucket_step", 1), ("crops", 1), ("smallest", 0), ("near_duplicates", 0),
                            ("prior_count", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"images.{name} is {value}; it must be {least} or more.")
        if self.near_duplicates > 64:
            found.append(f"images.near_duplicates is {self.near_duplicates} of 256 bits; above 64 most pictures count as one.")
        if not 0 <= self.caption_dropout < 1:
            found.append(f"images.caption_dropout is {self.caption_dropout:g}; it must be at least 0 and below 1, such as 0.1.")
        return found
