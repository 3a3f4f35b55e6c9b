"""What a run on images can be refused for before torch is imported: missing folders of pictures."""

from __future__ import annotations

from pathlib import Path

from lorakeet.config import RunConfig
from lorakeet.data.locate import locate_model
from lorakeet.formats.adapter_format import require_adapter
from lorakeet.kinds.images.data.folder import is_table, require_folder
from lorakeet.kinds.images.drawing_options import GenerateOptions, adapters_and_mixes
from lorakeet.kinds.images.spec import images_of
from lorakeet.runs.output_paths import require_empty


def require_pictures(config: RunConfig, *, whole: bool) -> None:
    """Raises DataError for folders of pictures that are missing; `whole` changes nothing."""
    data = config.data
    places = {"data.train": data.train, "data.held_out": data.held_out, "data.test": data.test}
    for setting, folder in {**places, "images.prior": images_of(config).prior}.items():
        if folder and not is_table(folder):
            require_folder(Path(folder).expanduser(), setting)


def require_drawable(options: GenerateOptions) -> None:
    """Raises ConfigError or DataError for what can be refused before torch is imported."""
    require_empty(options.out)
    paths, _ = adapters_and_mixes(options)
    for path in paths.values():
        require_adapter(path)
    if options.model:
        locate_model(options.model)
