"""The names of what is measured on preferences, and their words in a report. Imports no torch."""

from __future__ import annotations

from lorakeet.evaluate.wording import MetricWords

PREFERRED, PREFERRED_ALIKE, LIKELIER = "preferred", "preferred_alike", "likelier"
CHOSEN_CHANGE, REJECTED_CHANGE, LEAD = "chosen_change", "rejected_change", "lead"
LONGER, SHORTER, DIFFERENCE = "longer answer", "shorter answer", "TF-IDF of the answers"
METRICS = {
    PREFERRED: MetricWords(
        "Chosen preferred", "of the pairs", "Share of pairs whose chosen answer is preferred", True, share=True, of_answers=False
    ),
    PREFERRED_ALIKE: MetricWords(
        "… equal length", "of the pairs of equal length", "The same for answers whose tokens differ by at most 10 %", True,
        share=True, of_answers=False,
    ),
    LIKELIER: MetricWords(
        "Chosen likelier", "of the pairs", "Share of pairs: chosen has the higher mean log p", True, share=True, of_answers=False
    ),
    LEAD: MetricWords(
        "Lead", "nats", "Lead of the chosen answer, in nats; a token if divided by length (ipo, orpo, simpo)", True, drawn=False
    ),
    CHOSEN_CHANGE: MetricWords(
        "Chosen, change", "nats a token", "log p of the chosen answers less that of the reference or base", True, drawn=False
    ),
    REJECTED_CHANGE: MetricWords(
        "Rejected, change", "nats a token", "log p of the rejected answers less that of the reference or base", False, drawn=False
    ),
}  # fmt: skip
RIVALS = {
    LONGER: "the longer answer", SHORTER: "the shorter answer", DIFFERENCE: "TF-IDF of the answers alone",
    "reference": "its reference",
}  # fmt: skip  # systems as a sentence names them
