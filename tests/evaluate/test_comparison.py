"""The report has each figure in its row, and says in plain words when a run has not worked."""

import json

import torch

from fastjepa.evaluate.comparison import Accuracy, Report, Split, evaluate_features, format_report
from fastjepa.evaluate.probes import Health, knn_accuracy, linear_accuracy, representation_health

HEALTHY = Health(feature_std=0.4534, mean_cosine=0.3782, effective_rank=24.91, width=64)
COLLAPSED = Health(feature_std=0.0218, mean_cosine=0.9995, effective_rank=14.49, width=32)


def test_the_text_of_a_healthy_run() -> None:
    report = Report(
        learned=Accuracy(knn=0.784, linear=0.7925),
        random=Accuracy(knn=0.672, linear=0.715),
        pixels=Accuracy(knn=0.8305, linear=0.786),
        health=HEALTHY,
    )
    assert format_report(report).splitlines() == [
        "frozen features                k-NN   linear",
        "learned (target encoder)     78.4 %   79.2 %",
        "random initialisation        67.2 %   71.5 %",
        "  learned - random          +11.2     +7.8",
        "raw pixels                   83.0 %   78.6 %",
        "learned features: std 0.453, mean cosine 0.378, effective rank 24.9 of 64",
        "no sign of collapse",
        "raw pixels reach more (83.0 % k-NN), which is expected for small images: see README",
    ]


def test_the_text_of_a_collapsed_run_says_collapsed_and_nothing_learned() -> None:
    report = Report(Accuracy(0.508, 0.7), Accuracy(0.536, 0.77), Accuracy(0.5, 0.6), COLLAPSED)
    text = format_report(report)
    assert "COLLAPSED: the features are nearly the same for every image (mean cosine 0.9995)" in text
    assert "NOTHING LEARNED" in text
    assert "-2.8     -7.0" in text
    assert "no sign of collapse" not in text
    assert "raw pixels reach more" not in text


def test_every_row_is_probed_on_its_own_features() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4

    def split(noise: float) -> Split:
        x = torch.eye(4)[y] + noise * torch.randn(400, 4, generator=generator)
        return Split(x[:200], x[200:])

    learned, random, pixels = split(0.1), split(1.0), split(0.5)
    labels = Split(y[:200], y[200:])
    report = evaluate_features(learned, random, pixels, labels)
    for accuracy, features in ((report.learned, learned), (report.random, random), (report.pixels, pixels)):
        assert accuracy.knn == knn_accuracy(features.train, labels.train, features.test, labels.test)
        assert accuracy.linear == linear_accuracy(features.train, labels.train, features.test, labels.test)
    assert report.health == representation_health(learned.train)
    assert report.random.knn < report.pixels.knn < report.learned.knn


def test_a_report_can_be_written_as_json() -> None:
    report = Report(Accuracy(0.5, 0.7), Accuracy(0.5, 0.7), Accuracy(0.5, 0.6), COLLAPSED)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["learned"] == {"knn": 0.5, "linear": 0.7}
    assert values["health"]["effective_rank"] == 14.49
    assert values["verdict"] == COLLAPSED.verdict()
