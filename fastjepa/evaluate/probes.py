"""Probes on frozen features: k-NN, logistic regression, and the health of the representation.

Features are float32 [n, D], labels int64 [n] (any class numbers), all on one device. No probe draws random numbers. Inputs
that would give a meaningless figure are refused with a ValueError.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_SIMILARITIES = 2**26
"""Number of similarities that the k-NN probe holds at a time: 256 MiB."""

# L-BFGS stops when no component of the gradient is larger. On 8,000 Fashion-MNIST images as 784 pixels the loss is then
# 3e-5 above its minimum, after 580 evaluations; below 2e-5 float32 makes no further progress there.
GRADIENT_TOLERANCE = 3e-5
MAX_ITERATIONS = 5000

# A representation beyond either of the two limits below counts as collapsed. Measured at width 32 (digits, 1,200 steps) and
# 64 (Fashion-MNIST, 1,000):
#                                                        mean cosine      effective rank
#   random initialisation of std 1/sqrt(fan_in)          0.70 - 0.96      15.4 - 29.3
#   learning with EMA, from step 50 to the end           0.38 - 0.985     15.4 - 26.9
#   learning without EMA (2 of 3 runs)                   0.40 - 0.989     15.0 - 23.7
#   collapsed without EMA (digits, from step 800)        0.9995           14.5 - 15.3
#   collapsed, targets with gradients (digits)           0.9998           16.4 - 17.0
#   initialisation of std 0.02, before and in training   0.9999           4.0 - 5.4
# The rank alone misses two kinds of collapse; it is needed for features that share no offset. Neither figure tells
# whether the EMA works: without the EMA, k-NN was 74.4 % on Fashion-MNIST (74.7 % with), and 51 and 71 % on digits (80 %).
MAX_MEAN_COSINE = 0.997
MIN_EFFECTIVE_RANK = 8.0
MIN_SAMPLES = 64  # n samples have a rank of n - 1 at most, so a smaller set would look like a collapse


def standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and scale every feature of both sets, by its mean and standard deviation over `train`.

    A feature that is constant in `train`, up to rounding, is only centred. Scaling would turn it into noise or infinity.
    """
    std, mean = torch.std_mean(train, dim=0, correction=0)
    std = std.masked_fill(std <= 1e-6 * train.abs().amax(0), 1.0)
    return (train - mean) / std, (test - mean) / std


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of `test` whose label wins the weighted vote of the k nearest neighbours in `train`.

    Similarity is the cosine after the mean of `train` is subtracted. A neighbour's vote has the weight exp(similarity /
    temperature) (Wu et al. 2018, section 3.4).

    Raises:
        ValueError: unusable features or labels, or fewer than k training samples.
    """
    _check(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k = {k}: expected 1 to {len(train_x)}, the number of training samples")
    mean = train_x.mean(0)
    train_x, test_x = F.normalize(train_x - mean, dim=1), F.normalize(test_x - mean, dim=1)
    classes, targets = train_y.unique(return_inverse=True)
    chunk = max(1, MAX_SIMILARITIES // len(train_x))
    correct = 0
    for x, y in zip(test_x.split(chunk), test_y.split(chunk), strict=True):
        similarity, neighbours = (x @ train_x.T).topk(k, dim=1)  # [chunk, k]
        weight = ((similarity - 1) / temperature).exp()  # the -1 cancels in the vote and keeps exp() finite
        votes = x.new_zeros(len(x), len(classes)).scatter_add_(1, targets[neighbours], weight)
        correct += int((classes[votes.argmax(1)] == y).sum())
    return correct / len(test_x)


def linear_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, l2: float = 1e-3) -> float:
    """Share of `test` that a logistic regression on the standardised features (`fit_logistic`) classifies correctly.

    Raises:
        ValueError: unusable features or labels.
    """
    _check(train_x, train_y, test_x, test_y)
    train_x, test_x = standardize(train_x, test_x)
    classes, targets = train_y.unique(return_inverse=True)
    weight, bias = fit_logistic(train_x, targets, len(classes), l2)
    predicted = classes[F.linear(test_x, weight, bias).argmax(1)]
    return int((predicted == test_y).sum()) / len(test_x)


def fit_logistic(x: Tensor, y: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: minimise mean cross-entropy + l2 / 2 · ‖weight‖² (no penalty on the bias).

    The solver is full-batch L-BFGS with a strong Wolfe line search, from zero. If it does not converge, a warning is logged.

    Args:
        x: [n, D], standardised.
        y: [n], values in [0, num_classes), each of which occurs.

    Returns:
        weight [num_classes, D] and bias [num_classes].
    """
    weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,  # the default stops when progress is slow, long before the minimum
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(loss_and_gradient)
        loss = loss_and_gradient()
    gradient = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    if gradient > 10 * GRADIENT_TOLERANCE:  # a smaller gradient is only float32's rounding
        logger.warning(
            "The linear probe has not converged: loss %.4f, largest component of the gradient %.1e", loss, gradient
        )
    return weight.detach(), bias.detach()


@dataclass(frozen=True)
class Health:
    """Measures of how well a representation still tells its inputs apart (`representation_health`)."""

    feature_std: float
    """Standard deviation over the samples, averaged over the features."""
    mean_cosine: float
    """Mean cosine between two different samples, not centred: 1 if the features of all samples are the same."""
    effective_rank: float
    """exp of the entropy of the centred features' normalised singular values (Roy and Vetterli 2007); 0 if constant."""
    width: int
    """Number of features, D."""

    def verdict(self) -> str | None:
        """The reason why the representation counts as collapsed, in plain words; None if it does not.

        The limits are MAX_MEAN_COSINE and MIN_EFFECTIVE_RANK; the latter is at most a quarter of the width.
        """
        if self.mean_cosine > MAX_MEAN_COSINE:
            symptom = f"the features are nearly the same for every image (mean cosine {self.mean_cosine:.4f})"
        elif self.effective_rank < min(MIN_EFFECTIVE_RANK, self.width / 4):
            symptom = f"the features vary in only about {self.effective_rank:.1f} of {self.width} directions"
        else:
            return None
        causes = "no EMA or one in low precision, or an initialisation too small for the width"
        return f"COLLAPSED: {symptom}. Usual causes: {causes}."


def representation_health(features: Tensor) -> Health:
    """Measure spread, similarity and rank of features [n, D]. Take n well above D: the rank is n - 1 at most.

    Raises:
        ValueError: the features are not a finite float32 matrix, or there are fewer than MIN_SAMPLES.
    """
    _check_features("features", features)
    n, width = features.shape
    if n < MIN_SAMPLES:
        raise ValueError(f"features: got {n} samples, expected {MIN_SAMPLES} or more to judge a collapse")
    x = features.double()
    centred = x - x.mean(0)
    # Use the D×D matrix, because n may be a million. float64 keeps singular values down to 1e-8 of the largest.
    singular = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    share = singular / singular.sum()
    rank = float(torch.special.entr(share).sum().exp()) if bool(singular.sum() > 0) else 0.0
    unit = F.normalize(x, dim=1)
    cosine_sum = unit.sum(0).square().sum() - unit.square().sum()  # all ordered pairs of different samples
    return Health(float(x.std(0, correction=0).mean()), float(cosine_sum) / (n * (n - 1)), rank, width)


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        _check_features(f"{name} features", x)
        if y.shape != x.shape[:1] or y.dtype != torch.int64:
            raise ValueError(f"{name} labels: got {y.dtype} {list(y.shape)}, expected int64 [{len(x)}], one per sample")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"test features: got width {test_x.shape[1]}, expected {train_x.shape[1]} as in training")
    if bool((train_y == train_y[0]).all()):
        raise ValueError(f"train labels: all are {int(train_y[0])}, expected two classes or more")


def _check_features(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.numel() == 0 or x.dtype != torch.float32:
        raise ValueError(f"{name}: got {x.dtype} {list(x.shape)}, expected float32 [samples, width], not empty")
    finite = x.isfinite().all(1)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(
            f"{name}: NaN or infinity in {bad} of {len(x)} samples; has the loss diverged? See metrics.jsonl"
        )
