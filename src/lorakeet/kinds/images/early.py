"""What a run on images can be refused for before torch is imported: missing folders of pictures."""

from __future__ import annotations

from pathlib import Path

from lorakeet.config import RunConfig
from lorakeet.kinds.images.data.folder import is_table, require_folder
from lorakeet.kinds.images.spec import images_of


def require_pictures(config: RunConfig, *, whole: bool) -> None:
    """Raises DataError for folders of pictures that are missing; `whole` changes nothing."""
    data = config.data
    places = {"data.train": data.train, "data.held_out": data.held_out, "data.test": data.test}
    for setting, folder in {**places, "images.prior": images_of(config).prior}.items():
        if folder and not is_table(folder):
            require_folder(Path(folder).expanduser(), setting)
