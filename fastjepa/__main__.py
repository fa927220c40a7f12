"""`fastjepa COMMAND ...` runs any of the command lines; `python -m fastjepa` does the same without an installation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Command -> its module, which is imported only when the command is given, and what it does.
COMMANDS = {
    "train": ("fastjepa.train", "pretrain I-JEPA"),
    "doctor": ("fastjepa.doctor.__main__", "check the installation, and find what limits the speed of a run"),
    "plan": ("fastjepa.plan.__main__", "choose the ZeRO stage and micro batch size for a model and a number of GPUs"),
    "check": ("fastjepa.data.check.__main__", "decode every image of a data set and report the bad ones"),
    "evaluate": ("fastjepa.evaluate.__main__", "evaluate the features of a run with k-NN and a linear probe"),
}
USAGE = "usage: fastjepa COMMAND ...\n\n" + "".join(f"  {name:<10}{what}\n" for name, (_, what) in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The command is not always the first argument: `deepspeed --module fastjepa train` puts --local_rank=N before it.
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is None:
        asked = not {"-h", "--help"}.isdisjoint(arguments)
        print(f"{USAGE}\nfastjepa COMMAND --help says more", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if command not in COMMANDS:
        print(f"fastjepa: error: unknown command {command}: expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    arguments.remove(command)
    status: int = importlib.import_module(COMMANDS[command][0]).main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
