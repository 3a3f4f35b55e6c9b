from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from lorakeet.evaluate.classifier.terms import Terms, characters_of, words_of

TEXTS = [
    "The lungs are clear; the heart is not.", "Clear LUNGS, no cough\tat all", "a b c", "", "Herz und Lunge: üblich, ﬁn",
    "这部电影很好 真的", "no no no cough cough", "the heart is clear",
]  # fmt: skip
FRESH = ["the heart coughs", "zzz", "lungs lungs", "电影"]
CASES = [
    (words_of, {"ngram_range": (1, 2)}),
    (characters_of(2, 5), {"analyzer": "char_wb", "ngram_range": (2, 5)}),
    (characters_of(1, 4), {"analyzer": "char_wb", "ngram_range": (1, 4)}),
]


@pytest.mark.parametrize(("split", "theirs"), CASES)
@pytest.mark.parametrize("least", [1, 2])
def test_vectors_equal_those_of_scikit_learn(split: object, theirs: dict[str, object], least: int) -> None:
    oracle = TfidfVectorizer(min_df=least, sublinear_tf=True, max_features=1 << 17, **theirs)
    expected = oracle.fit_transform(TEXTS)
    found = Terms.fitted(TEXTS, split, least=least, most=1 << 17)  # type: ignore[arg-type]
    assert found is not None
    terms, own = found
    assert terms.places == oracle.vocabulary_
    np.testing.assert_allclose(own.toarray(), expected.toarray(), rtol=0, atol=1e-15)
    np.testing.assert_allclose(terms.transform(FRESH).toarray(), oracle.transform(FRESH).toarray(), rtol=0, atol=1e-15)


def test_the_most_frequent_terms_are_kept() -> None:
    found = Terms.fitted(["b b b a", "a c", "a c"], lambda text: text.split(), most=2)
    assert found is not None and found[0].places == {"a": 0, "b": 1}


def test_texts_without_a_term_that_is_frequent_enough() -> None:
    assert Terms.fitted(["good", "bad"], words_of, least=2, most=10) is None
    assert Terms.fitted(["!", "?"], words_of, most=10) is None
