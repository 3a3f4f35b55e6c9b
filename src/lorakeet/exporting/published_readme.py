"""A model card as a hub shows it: with the repository's name, and the base's id there. Imports no torch."""

from __future__ import annotations

import yaml


def published_readme(text: str, name: str, *, base: str, relation: str) -> str:
    """The model card of a folder for the repository `name` of a hub; `base`, unless empty, is the base's id there.

    Raises ValueError for a text without front matter.
    """
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    if base:
        values = {"base_model": base, "base_model_relation": relation} | {
            key: value for key, value in values.items() if not key.startswith("base_model")
        }
    for folder in ("THIS FOLDER", "THIS_FOLDER"):
        body = body.replace(folder, name)
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n{body}"
