"""Compares learned features with random ones and raw pixels, and reports in a few lines whether a run worked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastjepa.evaluate.probes import Health, knn_accuracy, linear_accuracy, representation_health


class Split(NamedTuple):
    """Features float32 [n, D], or labels int64 [n], of the training images and of the held-out images."""

    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Accuracies of two probes: shares of the held-out images, in [0, 1]."""

    knn: float
    linear: float


@dataclass(frozen=True)
class Report:
    """Probes of a run's encoder, and of two baselines."""

    learned: Accuracy
    """The trained encoder (I-JEPA: the target encoder)."""
    random: Accuracy
    """The same encoder before training, initialised with the same seed."""
    pixels: Accuracy
    """The images themselves, downsampled and flattened."""
    health: Health
    """Health of the trained encoder's features of the training images."""

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, with the verdict on its health."""
        return {**asdict(self), "verdict": self.health.verdict()}


def evaluate_features(learned: Split, random: Split, pixels: Split, labels: Split) -> Report:
    """Probe three kinds of features of the same images.

    Args:
        learned: features of the trained encoder, averaged over the patches.
        random: the same of the encoder as it was initialised.
        pixels: the images that the encoders saw, downsampled and flattened.
        labels: class numbers of the images.

    Raises:
        ValueError: features or labels that cannot be probed.
    """
    learned_accuracy, random_accuracy, pixels_accuracy = (
        Accuracy(
            knn_accuracy(features.train, labels.train, features.test, labels.test),
            linear_accuracy(features.train, labels.train, features.test, labels.test),
        )
        for features in (learned, random, pixels)
    )
    return Report(learned_accuracy, random_accuracy, pixels_accuracy, representation_health(learned.train))


def format_report(report: Report) -> str:
    """The report as a table for a terminal, then its meaning in plain words. No newline at the end."""
    learned, random, pixels, health = report.learned, report.random, report.pixels, report.health
    lines = [
        f"{'frozen features':<26}{'k-NN':>9}{'linear':>9}",
        _row("learned (target encoder)", learned),
        _row("random initialisation", random),
        f"{'  learned - random':<26}{100 * (learned.knn - random.knn):>+7.1f}  "
        f"{100 * (learned.linear - random.linear):>+7.1f}".rstrip(),
        _row("raw pixels", pixels),
        f"learned features: std {health.feature_std:.3f}, mean cosine {health.mean_cosine:.3f}, "
        f"effective rank {health.effective_rank:.1f} of {health.width}",
        health.verdict() or "no sign of collapse",
    ]
    if learned.knn <= random.knn:
        lines.append("NOTHING LEARNED: the k-NN accuracy is not above that of the random initialisation")
    better = [
        f"{100 * theirs:.1f} % {name}"
        for name, theirs, ours in (("k-NN", pixels.knn, learned.knn), ("linear", pixels.linear, learned.linear))
        if theirs > ours
    ]
    if better:
        lines.append(f"raw pixels reach more ({', '.join(better)}), which is expected for small images: see README")
    return "\n".join(lines)


def _row(name: str, accuracy: Accuracy) -> str:
    return f"{name:<26}{100 * accuracy.knn:>7.1f} %{100 * accuracy.linear:>7.1f} %"
