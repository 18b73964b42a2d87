"""The ranker and the confidence find the feature that tells right from wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from miniglm.lookup.ranking import Linear, fit_logistic, fit_ranker


def test_ranker_finds_the_feature_that_tells() -> None:
    generator = np.random.default_rng(0)
    lists = []
    for _ in range(50):
        features = generator.normal(size=(6, 3)).astype(np.float32)
        lists.append((features, features[:, 1] == features[:, 1].max()))
    ranker = fit_ranker(lists)
    assert abs(ranker.weights[1]) > 3 * max(abs(ranker.weights[0]), abs(ranker.weights[2]))
    fresh = generator.normal(size=(20, 6, 3)).astype(np.float32)
    assert np.array_equal(ranker(fresh).argmax(axis=1), fresh[:, :, 1].argmax(axis=1))


def test_logistic_separates_and_weighs_classes_alike() -> None:
    generator = np.random.default_rng(0)
    features = np.concatenate([generator.normal(-2, 1, (180, 2)), generator.normal(2, 1, (20, 2))]).astype(np.float32)
    target = np.arange(200) >= 180
    judge = fit_logistic(features, target)
    assert ((judge(features) > 0) == target).mean() > 0.95


def test_linear_goes_through_json() -> None:
    ranker = Linear(np.ones(2, np.float32), np.full(2, 2, np.float32), np.array([1, -1], np.float32), 0.5)
    again = Linear.from_json(json.loads(json.dumps(ranker.to_json())))
    features = np.array([[3, 1]], np.float32)
    assert again(features).tolist() == ranker(features).tolist() == [1.5]


def test_no_right_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="right candidate"):
        fit_ranker([(np.zeros((2, 1), np.float32), np.zeros(2, bool))])
