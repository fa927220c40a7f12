"""fastjepa COMMAND ...: one name for all command lines; `python -m fastjepa` where the package is not installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Command -> its module, imported only when asked for, and what it does.
COMMANDS = {
    "train": ("fastjepa.train", "pretrain I-JEPA"),
    "doctor": ("fastjepa.doctor.__main__", "check the installation, and what limits a run"),
    "plan": ("fastjepa.plan.__main__", "which ZeRO stage and micro batch for a model on a number of GPUs"),
    "check": ("fastjepa.data.check.__main__", "look at every image of a data set"),
    "evaluate": ("fastjepa.evaluate.__main__", "k-NN and linear probe of a run"),
}
USAGE = "usage: fastjepa COMMAND ...\n\n" + "".join(f"  {name:<10}{what}\n" for name, (_, what) in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Not always the first: `deepspeed --module fastjepa train` puts --local_rank=N before it.
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is None:
        asked = not {"-h", "--help"}.isdisjoint(arguments)
        print(f"{USAGE}\nfastjepa COMMAND --help says more", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if command not in COMMANDS:
        print(f"fastjepa: error: {command}: expected one of the commands {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    arguments.remove(command)
    status: int = importlib.import_module(COMMANDS[command][0]).main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
