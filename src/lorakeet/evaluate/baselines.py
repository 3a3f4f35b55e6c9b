"""Baselines without a language model: majority class, logistic regression on terms or embeddings, copies of training answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakeet.errors import DataError, Problems, percent
from lorakeet.evaluate.answers import Answers, answers_from_probabilities
from lorakeet.evaluate.classifier.logistic import ITERATIONS, Regression, regression
from lorakeet.evaluate.classifier.terms import Split, Terms, characters_of, words_of
from lorakeet.evaluate.intervals import Floats
from lorakeet.evaluate.replies import Replies, unspaced_share

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"
EMBEDDED = "sentence embeddings + logistic regression"
NEAREST = "nearest training answer"
CONSTANT = "constant answer"
MEDIAN = "median training answer"

Embed = Callable[[Sequence[str]], Floats]  # texts to vectors (texts, width)
WORDS, LETTERS, EMBEDDINGS = "words", "characters", "embeddings"
FOLDS = 5  # of the cross-validation that chooses between words, characters and embeddings
FOLD_ROWS = 3000  # training rows that it takes at most
CHARACTERS = 5_000_000  # of training texts that a regression is fitted to, or that are searched, at most
CHARACTER_BYTES = 72  # that their terms take for each character, measured with character 2-5-grams
FEATURES = 1 << 17  # that it has at most: the most frequent ones


def majority_class(
    train_labels: Sequence[str], truth: Sequence[str], *, labels: Sequence[str], groups: Sequence[Hashable] | None = None
) -> Answers:
    """Answers every row with the label frequencies of the training rows, (count + 1) / (rows + labels)."""
    _check(train_labels, truth, labels)
    frequencies = _frequencies(train_labels, labels)
    note = f"always answers '{labels[int(frequencies.argmax())]}'"
    table = np.tile(frequencies, (len(truth), 1))
    return answers_from_probabilities(MAJORITY, table, labels=labels, truth=_index(truth, labels), groups=groups, note=note)


def tfidf_logistic(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    *,
    texts: Sequence[str],
    truth: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    embed: Embed | None = None,
) -> Answers:
    """Answers by TF-IDF (sublinear, terms in at least 2 rows) and logistic regression (C = 10, balanced classes).

    Terms are word 1-2-grams or character 2-5-grams, whichever answers more training rows right in a 5-fold cross-validation;
    `note` says which. Texts without spaces between words (Chinese, Japanese, Thai) have character 1-4-grams. Needs two labels
    among the training rows. If no term occurs in two rows, all are used; without terms, the answers are the majority's; `note`
    says either. A label of no training row gets 1 / (rows + 1). With `embed`, embeddings are compared too, and the system has
    their name if they are chosen.
    """
    _check(train_labels, truth, labels)
    present = set(train_labels)
    if len(present) < 2:
        raise DataError(f"{TFIDF} needs 2 labels in the training rows; all {len(train_labels)} are '{train_labels[0]}'.")
    if len(train_texts) != len(train_labels) or len(texts) != len(truth):
        counts = f"{len(train_texts)} and {len(train_labels)} to train on, {len(texts)} and {len(truth)} to answer"
        raise DataError(f"Texts and labels differ in number: {counts}; expected one label for each text.")
    unseen = [label for label in labels if label not in present]
    note = f"never saw {', '.join(map(repr, unseen))}; " if unseen else ""
    vectors = None if embed is None else Embeddings.of([*train_texts[: _within(train_texts)], *texts], embed)
    probabilities, said, kind = _fit_and_answer(train_texts, train_labels, texts, labels, vectors)
    if probabilities is None:
        probabilities = np.tile(_frequencies(train_labels, labels), (len(texts), 1))
    system = EMBEDDED if kind == EMBEDDINGS else TFIDF
    return answers_from_probabilities(
        system, probabilities, labels=labels, truth=_index(truth, labels), groups=groups, note=(note + said).rstrip("; ")
    )


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The vectors of known texts, in place of their terms."""

    vectors: dict[str, Floats]

    @classmethod
    def of(cls, texts: Sequence[str], embed: Embed) -> Embeddings:
        """Each text embedded once."""
        different = list(dict.fromkeys(texts))
        return cls(dict(zip(different, embed(different), strict=True)))

    def transform(self, texts: Sequence[str]) -> Floats:
        """The vectors (texts, width), of length 1 as those of terms are."""
        return np.stack([self.vectors[text] for text in texts])


def _fit_and_answer(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[str],
    vectors: Embeddings | None,
) -> tuple[Floats | None, str, str]:
    """The probabilities, None without words; what was unusual; words, characters or embeddings."""
    count = _within(train_texts)
    said = f"the first {count} training rows; " if count < len(train_texts) else ""
    train_texts, train_labels = train_texts[:count], train_labels[:count]
    kind, why = _better_terms(train_texts, train_labels, vectors)
    fitted = _fit(train_texts, train_labels, kind, vectors)
    if fitted is None:
        return None, "the training rows have no words, so it answers like the majority class", kind
    terms, model, fault = fitted
    known = model.probabilities(terms.transform(texts))
    columns = {label: index for index, label in enumerate(model.classes)}
    floor = 1 / (len(train_labels) + 1)
    table = np.stack([known[:, columns[label]] if label in columns else np.full(len(texts), floor) for label in labels], axis=1)
    return table / table.sum(axis=1, keepdims=True), why + said + fault, kind


def _within(texts: Sequence[str]) -> int:
    """How many of the texts, from the first on, have at most CHARACTERS; at least one."""
    return min(len(texts), max(1, int(np.searchsorted(np.cumsum([len(text) for text in texts]), CHARACTERS))))


def _better_terms(texts: Sequence[str], labels: Sequence[str], vectors: Embeddings | None) -> tuple[str, str]:
    """"words", "characters" or "embeddings", by cross-validation on training rows, and why."""
    order = np.random.default_rng(0).permutation(len(texts))[:FOLD_ROWS]
    if len(order) < 2 * FOLDS:
        kind = "words" if unspaced_share(texts) < 0.5 else "characters"
        return kind, f"{kind}, since {len(texts)} training rows are too few to compare; " if kind == "characters" else ""
    right = dict.fromkeys((WORDS, LETTERS, *([] if vectors is None else [EMBEDDINGS])), 0)
    for fold in range(FOLDS):
        inside, outside = order[np.arange(len(order)) % FOLDS != fold], order[fold::FOLDS]
        chosen = [labels[row] for row in inside]
        if len(set(chosen)) < 2:
            continue
        for kind in right:
            fitted = _fit([texts[row] for row in inside], chosen, kind, vectors)
            if fitted is not None:
                answers = fitted[1].answers(fitted[0].transform([texts[row] for row in outside]))
                right[kind] += sum(answer == labels[row] for answer, row in zip(answers, outside, strict=True))
    kind = max(right, key=lambda name: right[name])
    *others, last = (f"{percent(count / len(order))} by {name}" for name, count in right.items())
    shares = f"{', '.join(others)} and {last}"
    return kind, f"{kind} (accuracy in cross-validation {shares}); "


def _fit(
    texts: Sequence[str], labels: Sequence[str], kind: str, vectors: Embeddings | None
) -> tuple[Terms | Embeddings, Regression, str] | None:
    """The fitted terms (or `vectors`) and regression, and what was unusual; None if the texts have no terms."""
    if kind == EMBEDDINGS and vectors is not None:
        return vectors, *_regression(vectors.transform(texts), labels)
    split: Split = words_of
    if kind != WORDS:
        split = characters_of(1, 4) if unspaced_share(texts) >= 0.2 else characters_of(2, 5)
    said = ""
    found = Terms.fitted(texts, split, least=2, most=FEATURES)
    if found is None:
        said = "no word occurs in two training rows, so words of a single row are used; "
        found = Terms.fitted(texts, split, most=FEATURES)
    if found is None:
        return None
    terms, features = found
    model, fault = _regression(features, labels)
    return terms, model, said + fault


def _regression(features: Any, labels: Sequence[str]) -> tuple[Regression, str]:
    """The fitted logistic regression, and whether it had not converged."""
    model = regression(features, labels)
    return model, "" if model.converged else f"the logistic regression had not converged after {ITERATIONS} iterations; "


def nearest_answers(
    train_prompts: Sequence[str], train_answers: Sequence[str], prompts: Sequence[str], *, like: Replies
) -> Replies:
    """Copies the answer of the training prompt that is most similar (cosine of TF-IDF over character 2-5-grams).

    `like` has the references and groups of the prompts.
    """
    count = _within(train_prompts)
    train_prompts, train_answers = train_prompts[:count], train_answers[:count]
    found = Terms.fitted(train_prompts, characters_of(2, 5), most=FEATURES)
    if found is None:  # no prompt has a term
        return constant_answer(train_answers, like=like)
    terms, known = found
    nearest = np.asarray((terms.transform(prompts) @ known.T).argmax(axis=1)).ravel()
    return _copied(NEAREST, [train_answers[row] for row in nearest], like, f"out of {len(train_answers)} training rows")


def constant_answer(train_answers: Sequence[str], *, like: Replies) -> Replies:
    """The most frequent training answer, the first of them, as the reply to every prompt."""
    answer, count = Counter(train_answers).most_common(1)[0]
    return _copied(CONSTANT, [answer] * len(like.references), like, f"{answer!r:.60}, which {count} of {len(train_answers)} have")


def median_answer(train_answers: Sequence[str], *, like: Replies) -> Replies | None:
    """The training answer with the median number as the reply to every prompt: no constant has less absolute error.

    None where answers are not read as numbers, or as labels of a scale.
    """
    if (how := like.how).kind not in ("numbers", "ordered labels"):
        return None
    found = sorted((number, text) for text in train_answers if (number := how.number(text)) is not None)
    if not found:
        return None
    text = found[(len(found) - 1) // 2][1]
    return _copied(MEDIAN, [text] * len(like.references), like, f"{text!r:.60}, of {len(found)} training answers")


def _copied(system: str, texts: Sequence[str], like: Replies, note: str) -> Replies:
    return Replies(system, tuple(texts), like.references, (), like.groups, note, like.known, like.scale)


def _frequencies(train_labels: Sequence[str], labels: Sequence[str]) -> Floats:
    counts = Counter(train_labels)
    return np.array([counts[label] + 1 for label in labels], dtype=np.float64) / (len(train_labels) + len(labels))


def _index(truth: Sequence[str], labels: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    position = {label: index for index, label in enumerate(labels)}
    return np.array([position[label] for label in truth], dtype=np.int64)


def _check(train_labels: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> None:
    problems = Problems("The baselines cannot be measured", kind=DataError)
    if len(labels) < 2:
        problems.add(f"Classification needs at least 2 labels; found {len(labels)}: {', '.join(labels) or 'none'}.")
    if not train_labels:
        problems.add("There are 0 training rows; expected at least 1.")
    if not truth:
        problems.add("There are 0 rows to answer; expected at least 1.")
    for name, given in (("training", train_labels), ("held-out", truth)):
        unknown = sorted(set(given) - set(labels))
        if unknown:
            known = ", ".join(map(repr, labels))
            problems.add(f"The {name} rows have the labels {', '.join(map(repr, unknown))}; expected only {known}.")
    problems.raise_if_any()
