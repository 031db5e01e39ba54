"""``python -m l2p_fast.plot RUN [RUN ...]``: draw the curves of trainings to ``RUN/curves.png``, or side by side."""

from __future__ import annotations

from pathlib import Path

from .errors import Parser, run_cli


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="python -m l2p_fast.plot", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    p.add_argument("--out", type=Path, help="the PNG to write (default: curves.png in the first run's folder)")
    args = p.parse_args(argv)
    from .training.plots import draw_curves  # --help needs no torch

    out = args.out or args.runs[0] / "curves.png"
    draw_curves(args.runs, out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
