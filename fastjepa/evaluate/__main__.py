"""Probe the frozen encoder of a run: k-NN, linear classifier, and whether the representations collapsed."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from fastjepa.errors import FastjepaError
from fastjepa.evaluate.evaluation import evaluate_run
from fastjepa.run.folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastjepa.evaluate", description=__doc__)
    parser.add_argument("run_folder", help="the run's output_dir, with a checkpoint")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        evaluate_run(RunFolder(args.run_folder), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except FastjepaError as error:
        print(f"fastjepa: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
