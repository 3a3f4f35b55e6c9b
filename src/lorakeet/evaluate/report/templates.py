"""Templates of pages: everything is escaped, and a name that is not given is an error."""

from __future__ import annotations

from collections.abc import Callable

import jinja2


def page_templates(source: Callable[[str], str]) -> jinja2.Environment:
    """The templates that `source` returns the texts of, by their names."""
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(source),
    )
