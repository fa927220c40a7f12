"""The probes agree with scikit-learn and NumPy on real features and with known answers on made ones; others are refused."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fastjepa.evaluate import probes
from fastjepa.evaluate.probes import (
    fit_logistic,
    knn_accuracy,
    linear_accuracy,
    representation_health,
    standardize,
)

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Data:
    """scikit-learn's digits: 1,297 training and 500 test images of 64 pixels. Some pixels are 0 in all of them."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.from_numpy(x[order]).float(), torch.from_numpy(y[order]).long()
    return x[:1297], y[:1297], x[1297:], y[1297:]


def gaussian(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def separable(n: int = 400) -> Data:
    """Four classes around the corners of a simplex, with class numbers that are neither dense nor positive."""
    y = torch.tensor([-3, 0, 7, 1000])[torch.arange(n) % 4]
    x = 5 * torch.eye(4)[torch.arange(n) % 4] + 0.1 * gaussian(n, 4)
    return x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :]


def knn_labels_by_numpy(data: Data, k: int, temperature: float) -> Tensor:
    """The labels by the weighted vote, written as loops over single samples in float64."""
    train_x, train_y, test_x, _ = (t.numpy().astype(np.float64) for t in data)
    labels = []
    for sample in test_x:
        a, b = train_x - train_x.mean(0), sample - train_x.mean(0)
        similarity = a @ b / (np.linalg.norm(a, axis=1) * np.linalg.norm(b))
        votes: dict[int, float] = {}
        for i in np.argsort(-similarity)[:k]:
            votes[int(train_y[i])] = votes.get(int(train_y[i]), 0.0) + np.exp(similarity[i] / temperature)
        labels.append(max(votes, key=lambda label: votes[label]))
    return torch.tensor(labels)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (200, 0.5)])
def test_knn_gives_the_labels_of_a_plain_numpy_vote(digits: Data, k: int, temperature: float) -> None:
    train_x, train_y, test_x, _ = digits
    expected = knn_labels_by_numpy(digits, k, temperature)
    agreement = knn_accuracy(train_x, train_y, test_x, expected, k, temperature)
    assert agreement >= 1 - 1 / len(test_x)  # one near-tie may fall differently in float32


def test_knn_in_chunks_equals_knn_at_once(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = knn_accuracy(*digits)
    monkeypatch.setattr(probes, "MAX_SIMILARITIES", 7 * len(digits[0]))
    assert knn_accuracy(*digits) == at_once


def test_linear_probe_gives_the_optimum_and_the_labels_of_scikit_learn(digits: Data) -> None:
    train_x, train_y, test_x, _ = digits
    l2 = 1e-3
    x, x_test = standardize(train_x, test_x)
    reference = LogisticRegression(C=1 / (len(x) * l2), tol=1e-6, max_iter=10_000).fit(
        x.double().numpy(), train_y.numpy()
    )

    def loss(weight: Tensor, bias: Tensor) -> float:
        logits = x.double() @ weight.double().T + bias.double()
        return float(torch.nn.functional.cross_entropy(logits, train_y) + l2 / 2 * weight.double().square().sum())

    ours = loss(*fit_logistic(x, train_y, 10, l2))
    optimum = loss(torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_))
    assert abs(ours - optimum) < 1e-4
    predicted = torch.from_numpy(reference.predict(x_test.double().numpy()))
    assert linear_accuracy(train_x, train_y, test_x, predicted, l2) >= 1 - 1 / len(test_x)


def test_linear_probe_warns_when_it_has_not_converged(
    digits: Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linear_accuracy(*digits)
    assert not caplog.records
    monkeypatch.setattr(probes, "MAX_ITERATIONS", 3)
    with caplog.at_level(logging.WARNING):
        linear_accuracy(*digits)
    assert "not converged" in caplog.text


def test_probes_are_deterministic_and_work_without_autograd(digits: Data) -> None:
    with torch.no_grad():
        assert linear_accuracy(*digits) == linear_accuracy(*digits)
        assert knn_accuracy(*digits) == knn_accuracy(*digits)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy])
def test_separable_classes_are_all_found(probe: Callable[..., float]) -> None:
    assert probe(*separable()) == 1.0


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy])
def test_random_labels_are_found_at_chance(probe: Callable[..., float]) -> None:
    n, classes = 2000, 4
    y = torch.randint(classes, (2 * n,), generator=torch.Generator().manual_seed(1))
    x = gaussian(2 * n, 8)
    chance = 1 / classes
    deviation = (chance * (1 - chance) / n) ** 0.5
    assert abs(probe(x[:n], y[:n], x[n:], y[n:]) - chance) < 4 * deviation  # binomial, p = 6e-5


def test_standardize_uses_the_statistics_of_the_training_set() -> None:
    train, test = 3 * gaussian(500, 5) + 7, gaussian(100, 5, seed=1)
    got_train, got_test = standardize(train, test)
    torch.testing.assert_close(got_train.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(got_train.std(0, correction=0), torch.ones(5))
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    torch.testing.assert_close(got_test.double(), (test - mean) / std, atol=1e-5, rtol=1e-5)


def test_standardize_only_centres_constant_features() -> None:
    train = gaussian(500, 3)
    train[:, 1] = 0.1
    train[::2, 1] = torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))  # the same but for rounding
    train[:, 2] = 0.0
    got_train, got_test = standardize(train, train[:10] + 1)
    torch.testing.assert_close(got_train[:, 1:], torch.zeros(500, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(got_test[:, 1:], torch.ones(10, 2), atol=1e-5, rtol=0)


def test_health_of_isotropic_features_is_full_rank_and_no_collapse() -> None:
    health = representation_health(gaussian(20_000, 32))
    assert abs(health.effective_rank - 32) < 0.1
    assert abs(health.mean_cosine) < 0.01
    assert abs(health.feature_std - 1) < 0.01
    assert health.width == 32
    assert health.verdict() is None


def test_health_equals_its_definition_in_numpy() -> None:
    x = gaussian(100, 6) * torch.arange(1.0, 7.0) + 1
    health = representation_health(x)
    d = x.numpy().astype(np.float64)
    singular = np.linalg.svd(d - d.mean(0), compute_uv=False)
    share = singular / singular.sum()
    assert health.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    cosines = np.corrcoef(np.hstack([d, -d]))  # rows of mean 0: correlation is the cosine
    assert health.mean_cosine == pytest.approx((cosines.sum() - 100) / (100 * 99), rel=1e-9)
    assert health.feature_std == pytest.approx(d.std(0).mean(), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_features_are_called_collapsed(value: float) -> None:
    health = representation_health(torch.full((300, 16), value))
    assert health.feature_std < 1e-6
    assert health.effective_rank < 1.01
    assert (health.verdict() or "").startswith("COLLAPSED")


def test_features_nearly_the_same_for_every_image_are_called_collapsed() -> None:
    health = representation_health(1 + 0.02 * gaussian(1000, 64))
    assert health.effective_rank > 60
    assert "nearly the same for every image" in (health.verdict() or "")


def test_features_of_rank_one_are_called_collapsed() -> None:
    health = representation_health(gaussian(1000, 1) * gaussian(1, 64, seed=1))
    assert health.effective_rank == pytest.approx(1, abs=1e-3)
    assert "1.0 of 64 directions" in (health.verdict() or "")


def test_a_common_offset_as_large_as_that_of_a_random_encoder_is_no_collapse() -> None:
    """Features of a randomly initialised encoder share a large offset (mean cosine 0.94 measured), which is no collapse."""
    health = representation_health(4 + gaussian(1000, 64))
    assert 0.93 < health.mean_cosine < 0.95
    assert health.verdict() is None


def bad_calls() -> list[tuple[str, Data]]:
    train_x, train_y, test_x, test_y = separable()
    with_nan = test_x.clone()
    with_nan[3, 1] = torch.nan
    return [
        ("train labels: all are 7", (train_x, torch.full_like(train_y, 7), test_x, test_y)),
        (r"train labels: got torch.int64 \[199\], expected int64 \[200\]", (train_x, train_y[1:], test_x, test_y)),
        ("test labels: got torch.float32", (train_x, train_y, test_x, test_y.float())),
        ("test features: NaN or infinity in 1 of 200", (train_x, train_y, with_nan, test_y)),
        ("test features: got width 3, expected 4", (train_x, train_y, test_x[:, :3], test_y)),
        (r"train features: got torch.float32 \[0, 4\]", (train_x[:0], train_y[:0], test_x, test_y)),
        ("train features: got torch.float16", (train_x.half(), train_y, test_x, test_y)),
        (r"train features: got torch.float32 \[200, 2, 2\]", (train_x.view(-1, 2, 2), train_y, test_x, test_y)),
    ]


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy])
@pytest.mark.parametrize(("message", "data"), bad_calls())
def test_unusable_features_and_labels_are_refused(probe: Callable[..., float], message: str, data: Data) -> None:
    with pytest.raises(ValueError, match=message):
        probe(*data)


@pytest.mark.parametrize("k", [0, 201])
def test_more_neighbours_than_training_samples_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k = {k}: expected 1 to 200"):
        knn_accuracy(*separable(), k=k)


def test_health_of_unusable_features_is_refused() -> None:
    with pytest.raises(ValueError, match="features: got 10 samples, expected 64 or more"):
        representation_health(gaussian(10, 4))
    with pytest.raises(ValueError, match="features: NaN or infinity in 100 of 100"):
        representation_health(torch.full((100, 4), torch.inf))
