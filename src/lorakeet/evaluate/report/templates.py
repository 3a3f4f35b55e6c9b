"""Templates of pages: everything is escaped, and a name that is not given is an error."""

from __future__ import annotations

from collections.abc import Callable

import jinja2

from lorakeet.errors import TURNING

SHOWN = {number: f"\\u{number:04x}" for number in (0x1B, *TURNING)}  # a text of a stranger changes the order of no page


def page_templates(source: Callable[[str], str]) -> jinja2.Environment:
    """The templates that `source` returns the texts of, by their names."""
    return jinja2.Environment(
        autoescape=True,
        finalize=lambda value: value.translate(SHOWN) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(source),
    )
