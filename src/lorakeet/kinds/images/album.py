"""What the studio's page of rows shows of pictures: captions, buckets, near-copies."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.kinds.images.data.folder import ImageRow, bucket_of, bucket_sizes, fit_remarks, open_pixels, png_of
from lorakeet.kinds.images.data.split import ImageDataset, load_images
from lorakeet.kinds.images.model.latent_cache import cache_in
from lorakeet.kinds.images.spec import images_of

PAIRS, PICTURES = 60, 48  # that are shown
_RESOLUTION, _MULTIPLE = 512, 64  # where no model says another
_THUMB = 160  # pixels


def show_album(config: RunConfig, send: Callable[[dict[str, Any]], None]) -> None:
    """Sends one part, the album; reads the pictures as a run would. Raises what a run would raise."""
    send({"say": "Reads the pictures, and searches for copies"})
    images = images_of(config)
    dataset = load_images(config.data, images, tables=cache_in(images, "tables"))
    resolution = images.resolution or _RESOLUTION
    step = images.bucket_step or max(_MULTIPLE, resolution // 8 // _MULTIPLE * _MULTIPLE)
    sizes = bucket_sizes(resolution, step) if images.buckets else [(resolution, resolution)]
    send({"part": "album", **album_values(dataset, sizes or [(resolution, resolution)])})


def album_values(dataset: ImageDataset, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """The pictures with captions, buckets and near-copies."""
    parts = {"training": dataset.train, "held-out": dataset.held_out, "test": dataset.test}
    every = [(part, row) for part, rows in parts.items() for row in rows]
    buckets = Counter(bucket_of(row, sizes) for _, row in every)
    return {
        "counts": {part: len(rows) for part, rows in parts.items()},
        "buckets": [[f"{width}×{height}", count] for (height, width), count in buckets.most_common()],
        "remarks": [*dataset.remarks, *fit_remarks([row for _, row in every], sizes)],
        "alike": [asdict(one) for one in dataset.alike[:PAIRS]],
        "called": "pictures",
        "shown_rows": [_picture(part, row, sizes) for part, row in every[:PICTURES]],
        "shown": min(len(every), PICTURES),
    }


def _picture(part: str, row: ImageRow, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    height, width = bucket_of(row, sizes)
    thumb = base64.b64encode(png_of(open_pixels(row.path)[0], largest=_THUMB)).decode("ascii")
    size = f"{row.width}×{row.height}, trained as {width}×{height}"
    return {"part": part, "source": row.source, "caption": row.caption, "size": size, "thumb": f"data:image/png;base64,{thumb}"}


