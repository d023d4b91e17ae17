import numpy as np
import pytest

from classifiers.eco import LinearHead, class_weights, fit_logistic, stack
from guard.errors import ArtifactError, DataError, ShapeError


def clouds(rng: np.random.Generator, distance: float) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat([0, 1], [300, 40])
    inputs = rng.normal(size=(340, 6)).astype(np.float32)
    inputs[:, 0] += distance * labels
    return inputs, labels


def test_class_weights_give_each_class_half() -> None:
    labels = np.array([1, 0, 0, 0])
    np.testing.assert_allclose(class_weights(labels), [0.5, 1 / 6, 1 / 6, 1 / 6], rtol=1e-6)
    weighted = class_weights(labels, np.array([1, 2, 1, 1], np.float32))
    np.testing.assert_allclose(weighted, [0.5, 0.25, 0.125, 0.125], rtol=1e-6)
    with pytest.raises(DataError):
        class_weights(np.zeros(3, np.int64))


def test_logistic_fit_finds_the_direction_and_is_a_minimum() -> None:
    inputs, labels = clouds(np.random.default_rng(0), 3.0)
    weights = class_weights(labels)

    def loss(weight: np.ndarray, bias: float) -> float:
        margin = np.where(labels == 1, 1.0, -1.0) * (inputs @ weight + bias)
        return float(weights @ np.logaddexp(0.0, -margin)) + 0.005 * float(weight @ weight)

    weight, bias = fit_logistic(inputs, labels, weights, penalty=0.01)
    assert np.argmax(np.abs(weight)) == 0 and weight[0] > 0
    best = loss(weight, bias)
    for axis in range(6):
        for step in (-0.05, 0.05):
            moved = weight.copy()
            moved[axis] += step
            assert loss(moved, bias) > best
    again, _ = fit_logistic(inputs, labels, weights, 0.01, start=(weight, bias))
    np.testing.assert_allclose(again, weight, atol=2e-2)


def test_folded_head_equals_standardised_head() -> None:
    rng = np.random.default_rng(1)
    head = LinearHead(
        rng.normal(size=5).astype(np.float32),
        0.3,
        rng.normal(size=5).astype(np.float32),
        rng.uniform(0.5, 2, 5).astype(np.float32),
    )
    inputs = rng.normal(size=(7, 5)).astype(np.float32)
    wanted = ((inputs - head.mean) / head.scale) @ head.weight + head.bias
    np.testing.assert_allclose(head.logits(inputs), wanted, atol=1e-5)
    with pytest.raises(ShapeError):
        head.logits(inputs[:, :4])


def test_stacking_trusts_names_more_than_an_overfitted_topic() -> None:
    rng = np.random.default_rng(2)
    inputs, labels = clouds(rng, 0.5)
    weight, bias = fit_logistic(inputs, labels, class_weights(labels), 0.01)
    topic = LinearHead(weight, bias, np.zeros(6, np.float32), np.ones(6, np.float32))
    names = np.where(labels == 1, rng.uniform(4, 9, 340), 0.0).astype(np.float32)[:, None]
    head = stack(topic, topic.logits(inputs), names, labels, class_weights(labels))
    both = np.concatenate([inputs, names], axis=1)
    assert (head.logits(both)[labels == 1] > 0).all()
    assert head.weight.shape == (7,)
    # Neither part ever speaks against the target, even where the data says so.
    against = stack(topic, -topic.logits(inputs), -names, labels, class_weights(labels))
    assert (against.weight[6:] >= 0).all()


def test_head_arrays_round_trip_and_damage_is_refused() -> None:
    head = LinearHead(np.ones(3, np.float32), 1.5, np.zeros(3, np.float32), np.ones(3, np.float32))
    arrays = head.to_arrays()
    again = LinearHead.from_arrays(arrays)
    assert again.bias == head.bias
    np.testing.assert_array_equal(again.weight, head.weight)
    for change in (
        {"mean": np.zeros(2, np.float32)},
        {"scale": np.zeros(3, np.float32)},
        {"weight": np.array([1, np.nan, 1], np.float32)},
        {"bias": np.zeros(2, np.float32)},
    ):
        with pytest.raises(ArtifactError):
            LinearHead.from_arrays({**arrays, **change})
    del arrays["bias"]
    with pytest.raises(ArtifactError, match="bias"):
        LinearHead.from_arrays(arrays)
