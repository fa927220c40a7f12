"""Probes on the frozen encoder of a run: `python -m fastjepa.evaluate RUN_FOLDER`."""

from fastjepa.evaluate.evaluation import evaluate_run, load_encoder

__all__ = ["evaluate_run", "load_encoder"]
