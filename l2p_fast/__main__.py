"""``python -m l2p_fast COMMAND ...``, installed as ``l2p COMMAND ...``: every command by its name."""

from __future__ import annotations

import difflib
import runpy
import sys

from .errors import UserError, run_cli

COMMANDS = {
    "sample": "draw images of prompts",
    "train": "train a model",
    "data": "make training images: categories, prompts, a filter, images, a page about them",
    "evaluate": "draw and score images: benchmarks, FID, CLIP, the patch grid",
    "convert": "make checkpoints out of checkpoints",
    "serve": "serve images over HTTP, by OpenAI's API",
    "info": "what is installed, and how the kernels were built; what a file holds",
    "plot": "draw the curves of trainings",
}


def usage() -> str:
    lines = [f"  {name:<9} {words}" for name, words in COMMANDS.items()]
    return "\n".join(["usage: l2p COMMAND ... (l2p COMMAND --help says more)", "", *lines])


def dispatch() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise UserError(f"no command {name!r}; {'try ' + near[0] if near else 'choose from ' + ', '.join(COMMANDS)}")
    sys.argv[:2] = [f"l2p {name}"]
    runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)
    return 0


def main() -> None:
    run_cli(dispatch)


if __name__ == "__main__":
    main()
