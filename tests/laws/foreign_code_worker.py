"""Loads folders in a process of its own and prints, as its last line, what became of each: `{name: "loaded" or the error}`.

Its argument is `{name: [loader, path]}` as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def load(loader: str, path: Path) -> Any:
    from lorakeet.kinds.images.model.clip_scorer import load_scorer
    from lorakeet.kinds.images.model.model import load_image_model
    from lorakeet.kinds.images.model.shapes import shapes_in
    from lorakeet.models.files.gguf_dense import dense_copy
    from lorakeet.models.files.gguf_packed import packed_copy
    from lorakeet.models.spec import ModelSpec
    from lorakeet.models.text.from_config import config_of
    from lorakeet.models.text.load import load_text_model, load_tokenizer

    def quiet(line: str) -> None:
        pass

    return {
        "model": lambda: load_text_model(ModelSpec(str(path)), say=quiet),
        "plan": lambda: config_of(ModelSpec(str(path)), quiet),
        "tokenizer": lambda: load_tokenizer(path),
        "gguf_dense": lambda: dense_copy(path / "m.gguf", quiet),
        "gguf_packed": lambda: packed_copy(path / "m.gguf", quiet),
        "images": lambda: load_image_model(ModelSpec(str(path)), say=quiet),
        "image_shapes": lambda: shapes_in(str(path), None, quiet),
        "scorer": lambda: load_scorer(str(path)),
    }[loader]()


def main() -> None:
    said = {}
    for name, (loader, path) in json.loads(sys.argv[1]).items():
        try:
            load(loader, Path(path))
            said[name] = "loaded"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))


main()
