from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from lorakeet.evaluate.classifier.logistic import regression


def rows(classes: int, count: int = 60) -> tuple[np.ndarray, list[str]]:
    """Features of length 1, whose classes overlap and are of unequal size."""
    chance = np.random.default_rng(classes)
    truth = chance.choice(classes, count, p=np.linspace(1, 3, classes) / np.linspace(1, 3, classes).sum())
    features = np.eye(classes, 6)[truth] + chance.normal(0, 1, (count, 6))
    return features / np.linalg.norm(features, axis=1, keepdims=True), [f"class {number}" for number in truth]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_probabilities_equal_those_of_scikit_learn(classes: int, sparse: bool) -> None:
    dense, labels = rows(classes)
    features = csr_array(dense) if sparse else dense
    expected = LogisticRegression(C=10, class_weight="balanced", max_iter=2000).fit(features, labels)
    found = regression(features, labels)
    assert found.converged and list(found.classes) == expected.classes_.tolist()
    np.testing.assert_allclose(found.probabilities(features), expected.predict_proba(features), rtol=0, atol=1e-6)
    assert found.answers(features) == expected.predict(features).tolist()


def test_scores_without_a_constant_equal_those_of_scikit_learn() -> None:
    features, labels = rows(2)
    expected = LogisticRegression(C=10, fit_intercept=False, max_iter=2000).fit(features, labels)
    found = regression(features, labels, intercept=False, balanced=False)
    assert not found.intercepts.any()
    np.testing.assert_allclose(found.scores(features)[:, 1], expected.decision_function(features), rtol=0, atol=1e-6)


def test_a_fit_that_was_cut_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.evaluate.classifier.logistic.ITERATIONS", 1)
    assert not regression(*rows(3)).converged
