"""Proposes which column is the text and which the label, by the columns' names in some languages and by what they hold."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from lorakeet.data.tables import FileRecord
from lorakeet.errors import Remedy, nearest, spelt

SAMPLED = 1000  # records that are read for a proposal
_TEXTS = (
    "text", "texts", "texte", "texto", "testo", "tekst", "tekstas", "sentence", "satz", "comment", "comments", "kommentar",
    "commentaire", "comentario", "commento", "opmerking", "review", "reviews", "bewertung", "rezension", "avis", "resena",
    "recensione", "message", "nachricht", "mensaje", "messaggio", "bericht", "body", "content", "contents", "inhalt", "contenu",
    "contenido", "contenuto", "description", "beschreibung", "descripcion", "descrizione", "beschwerde", "reclamation",
    "reclamo", "complaint", "feedback", "question", "frage", "pregunta", "domanda", "utterance", "query", "ticket", "tweet",
    "document", "dokument", "文本", "テキスト",
)  # fmt: skip
_LABELS = (
    "label", "labels", "category", "categories", "kategorie", "kategorien", "categorie", "categoria", "kategori", "kategoria",
    "rubrik", "class", "classe", "clase", "klasse", "klass", "tag", "tags", "topic", "thema", "theme", "tema", "intent",
    "sentiment", "stimmung", "target", "ziel", "etikett", "etiquette", "etiqueta", "etichetta", "type", "typ", "tipo", "art",
    "rating", "urgency", "dringlichkeit", "urgence", "urgencia", "urgenza", "priority", "prioritat", "priorite", "prioridad",
    "prioridade", "priorita", "标签", "ラヘル",
)  # fmt: skip
_PROMPTS = (
    "prompt", "question", "frage", "pregunta", "domanda", "pergunta", "vraag", "instruction", "anweisung", "query", "input",
    "user", "问题",
)  # fmt: skip
_ANSWERS = (
    "completion", "response", "answer", "antwort", "reponse", "respuesta", "risposta", "resposta", "antwoord", "output",
    "reply", "assistant", "target", "回答",
)  # fmt: skip
_SURE_LABELS = _LABELS[: _LABELS.index("rubrik")]  # names that say nothing else
_LABEL_LENGTH = 60  # characters, on average
_FEWEST = 6  # records from which what a column holds is evidence
_MOST_LABELS = 100
_NAMED = 4  # columns that may be the label, of which a sentence names no more


@dataclass(frozen=True)
class ColumnProposal:
    """The columns that seem to be the text and the label, each with the setting that says so; `words` is a sentence."""

    text: str | None
    label: str | None
    remedies: tuple[Remedy, ...]
    words: str
    undecided: tuple[str, ...] = ()  # columns of which one may be the label


def propose_columns(records: Sequence[FileRecord], given: Mapping[str, str | None]) -> ColumnProposal | None:
    """What a file's columns seem to be, from its first records; None where nothing speaks for it.

    `given` has the columns that were named for "text" and "label"; what is in the file is kept, and no setting proposed for it.
    """
    columns = list(dict.fromkeys(column for record in records for column in record.values))
    text = _given(given.get("text"), columns)
    label = _given(given.get("label"), columns)
    free = [column for column in columns if column not in (text, label)]
    proposed_label = label or _label_column(records, free)
    proposed_text = text or _text_column(records, [column for column in free if column != proposed_label])
    if proposed_text is None:
        return None
    remedies = []
    if proposed_text != text:
        remedies.append(column_remedy("text", proposed_text))
    if proposed_label is not None and proposed_label != given.get("label"):
        remedies.append(column_remedy("label", proposed_label))
    if not remedies:
        return None
    parts = [remedy.words for remedy in remedies]
    words = f"It seems that {' and '.join(parts)}: set {' '.join(remedy.flag for remedy in remedies)}."
    if proposed_label is None and (empty := _empty_label(records, free)):
        words = f"{words} Column {empty!r}, named like the label, is empty: to train on labels, fill it."
    elif proposed_label is None and (doubtful := undecided_labels(records, {proposed_text})):
        words = f"{words} {doubtful_label_note(records, doubtful)}"
        return ColumnProposal(proposed_text, proposed_label, tuple(remedies), words, tuple(doubtful))
    return ColumnProposal(proposed_text, proposed_label, tuple(remedies), words)


def propose_answers(columns: Collection[str]) -> str:
    """A sentence that names the columns to rename where two columns seem to be a question and its answer; else empty."""
    prompt, answer = (next((one for one in columns if _plain(one) in names), None) for names in (_PROMPTS, _ANSWERS))
    if prompt is None or answer is None or prompt == answer:
        return ""
    renamed = [f"{old!r} to {new!r}" for old, new in ((prompt, "prompt"), (answer, "completion")) if old != new]
    return f"If {prompt!r} is answered by {answer!r}, rename {' and '.join(renamed)}." if renamed else ""


def overlooked_label(records: Sequence[FileRecord], used: Collection[str]) -> Remedy | None:
    """The setting for a column beside those `used` that seems to hold labels; None if there is none, or more than one."""
    columns = list(dict.fromkeys(column for record in records for column in record.values if column not in used))
    column = _label_column(records, columns)
    return None if column is None else column_remedy("label", column)


def overlooked_label_note(name: str, records: Sequence[FileRecord], text_column: str, remedy: Remedy) -> str:
    """The sentence for a column of labels that is not read: how many values it has, and the setting that reads it."""
    values = _values(records, remedy.value)
    return (
        f"{name} is read as plain text: the model is trained to write column {text_column!r}. Column {remedy.value!r} is not "
        f"read; it has {len(values)} values that repeat, as labels do. If it is the label, set {remedy.flag}."
    )


def undecided_labels(records: Sequence[FileRecord], used: Collection[str]) -> list[str]:
    """Two or more columns beside those `used` that repeat as labels do; empty for fewer.

    None of them is likelier to be the label, so none is proposed.
    """
    repeated = [remedy.value for remedy in possible_labels(records, used)]
    return repeated if len(repeated) > 1 else []


def doubtful_label_note(records: Sequence[FileRecord], repeated: Sequence[str]) -> str:
    """The sentences for these `undecided_labels`."""
    named = " and ".join(f"{column!r} ({len(_values(records, column))} values)" for column in repeated[:_NAMED])
    more = f" and {len(repeated) - _NAMED} more" if len(repeated) > _NAMED else ""
    flag = spelt("data.label_column")
    return (
        f"{named}{more} have values that repeat, as labels do, and nothing says which is the label. If the texts are "
        f"labelled, set {flag} too; without it the model is trained to write the texts."
    )


def possible_labels(records: Sequence[FileRecord], used: Collection[str]) -> list[Remedy]:
    """The setting for each column beside those `used` whose values repeat as labels do."""
    columns = list(dict.fromkeys(column for record in records for column in record.values if column not in used))
    return [column_remedy("label", column) for column in columns if _repeats(records, column)]


def column_remedy(part: Literal["text", "label"], column: str) -> Remedy:
    """The setting that makes `column` that part of a row."""
    return Remedy(f"data.{part}_column", column, f"{column!r} is the {part}")


def near_column(name: str, columns: Collection[str]) -> str | None:
    """The column whose name differs from `name` in case, accents or little else; None if there is none, or several as near."""
    if alike := [column for column in columns if _plain(column) == _plain(name)]:
        return alike[0] if len(alike) == 1 else None
    close = nearest(name, columns)
    return next((column for column in columns if close and f"'{column}'" in close), None)


def _given(name: str | None, columns: Collection[str]) -> str | None:
    return name if name in columns else None


def _text_column(records: Sequence[FileRecord], columns: Sequence[str]) -> str | None:
    """The column named like a text; else the one of long, varied texts."""
    if named := _named(columns, _TEXTS):
        return named
    varied = []
    for column in columns:
        values = [said for record in records if (said := _said(record.values.get(column)))]
        if len(values) >= _FEWEST and 2 * len(set(values)) > len(values) and fmean(said.count(" ") for said in values) >= 1:
            varied.append((fmean(map(len, values)), column))
    return max(varied)[1] if varied else None


def _label_column(records: Sequence[FileRecord], columns: Sequence[str]) -> str | None:
    """The column named like a label, if what it holds does not speak against it; else the only one of few repeated values.

    None where the one that is named so is empty: another one is then hardly the label.
    """
    if _empty_label(records, columns):
        return None
    repeated = [column for column in columns if _repeats(records, column)]
    named = _named(columns, _LABELS)
    if named and (named in repeated or len(records) < _FEWEST):
        return named
    return repeated[0] if len(repeated) == 1 else None


def _empty_label(records: Sequence[FileRecord], columns: Sequence[str]) -> str | None:
    """The column named like a label that holds nothing; None if there is none."""
    named = _named(columns, _SURE_LABELS)
    return named if named and len(records) >= _FEWEST and not _values(records, named) else None


def _repeats(records: Sequence[FileRecord], column: str) -> bool:
    values = [said for record in records if (said := _said(record.values.get(column)))]
    different = len(set(values))
    few = 2 <= different <= min(_MOST_LABELS, len(values) // 3)
    return len(values) >= _FEWEST and few and fmean(map(len, values)) <= _LABEL_LENGTH


def _values(records: Sequence[FileRecord], column: str) -> set[str]:
    return {value for record in records if (value := _said(record.values.get(column)))}


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column whose name, or a word of it, comes first among `names`."""
    found = [(names.index(word), place) for place, column in enumerate(columns) for word in _words(column) if word in names]
    return columns[min(found)[1]] if found else None


def _words(column: str) -> list[str]:
    plain = _plain(column)
    return [plain, *"".join(sign if sign.isalnum() else " " for sign in plain).split()]


def _plain(name: str) -> str:
    """The name without case, accents and blanks at its ends."""
    decomposed = unicodedata.normalize("NFKD", name).casefold().strip()
    return "".join(sign for sign in decomposed if not unicodedata.combining(sign))


def _said(value: object) -> str:
    return "" if value is None or isinstance(value, (list, dict)) else str(value).strip()
