"""Probes on the frozen target encoder: `python -m fastjepa.evaluate RUN_FOLDER`."""

from fastjepa.evaluate.evaluation import evaluate_run, load_encoder

__all__ = ["evaluate_run", "load_encoder"]
