"""The benchmarks' JSON as a page of tables and plots: ``python -m benchmarks.report benchmarks/results/*.json``.

The tables go between the two marker comments of ``--page``, a plot of each file (time and memory against resolution)
into the folder that is named like the page.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from l2p_fast.errors import UserError, run_cli
from l2p_fast.files import atomic_path

from .measure import NOT_RUN

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
NEEDED = {"level", "name", "resolution", "variant", "status", "reason"}
LEVELS = ("op", "head", "block", "step", "image", "train")
PLOTTED = ("head", "step", "image", "train")
TITLES = {"head": "Detailer Head", "step": "one denoising step", "image": "one image", "train": "one training step"}
COLUMNS = ("what", "px", "version", "time", "time of ours to it", "extra memory", "its memory in all") + (
    "TFLOP",
    "GB moved",
    "of matmul peak",
    "of copy rate",
    "error (at most)",
)


def read(path: Path) -> tuple[dict, list[dict]]:
    """The machine and the rows of one file.

    Raises:
        UserError: no such file, or none that these benchmarks wrote.
    """
    try:
        data = json.loads(path.read_text())
        rows = [entry["extra_info"] for entry in data["benchmarks"]]
        machine = data["machine_info"]["l2p"] | {"cpu": data["machine_info"].get("cpu", {}).get("brand_raw")}
        headline(machine)
        incomplete = [
            row for row in rows if not NEEDED | ({"median_s"} if row["status"] == "ok" else set()) <= set(row)
        ]
        if incomplete:
            raise ValueError
    except OSError as error:
        words = f"{error.strerror}; make it with pytest benchmarks/ --benchmark-json={path}"
        raise UserError(f"can't read {path}: {words}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        words = "make one with pytest benchmarks/ --benchmark-json=FILE"
        raise UserError(f"{path} is no result of these benchmarks; {words}") from None
    if not rows:
        raise UserError(f"{path} holds no row; run pytest benchmarks/ again without -k")
    place = {level: i for i, level in enumerate(LEVELS)}
    kinds = list(dict.fromkeys(row["name"] for row in rows))  # compiled ones ran last, yet belong to their kind
    rows.sort(key=lambda row: (place.get(row["level"], len(LEVELS)), kinds.index(row["name"])))
    return machine, rows


def headline(machine: dict) -> str:
    """What was measured where, in words."""
    scale = machine["scale"]
    instructions = f" ({machine['instruction_set']})" if machine.get("instruction_set") else ""
    chip = machine.get("gpu") or f"{machine.get('cpu') or 'CPU'}{instructions}, {machine['threads']} threads"
    versions = f"PyTorch {machine['torch']}, diffusers {machine['diffusers']}, l2p_fast {machine['l2p_fast']}"
    peaks = f"{machine['matmul_flops'] / 1e12:.3g} TFLOP/s matmul, {machine['copy_bytes'] / 1e9:.3g} GB/s copy"
    channels = "-".join(map(str, scale["vae_channels"]))
    return (
        f"{chip}; {versions}; kernels: {machine['extension']}. Measured here: {peaks}. {scale['dtype']}, batch 1, "
        f"random weights. Whole models: width {scale['dim']}, {scale['layers']} layers, head x "
        f"{scale['head_width']:g}, autoencoder {channels}; a block or head alone: width {scale['wide']}."
    )


def amount(value: float | None, units: tuple[tuple[float, str], ...]) -> str:
    """``value`` with three digits in the largest unit that keeps it at 1 or more."""
    if value is None:
        return ""
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), units[-1])
    return f"{float(f'{value / size:.3g}'):g} {unit}"


def seconds(value: float | None) -> str:
    return amount(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def memory(megabytes: float | None) -> str:
    return amount(megabytes, ((1024, "GB"), (1, "MB")))


def cells(row: dict, ours: dict | None) -> list[str]:
    """One row of the table; ``ours`` is the row of the same kind that holds the ratios."""
    what = f"{row['level']}: {row['name']}"
    start = [what, str(row["resolution"]), row["variant"]]
    work = [f"{row[key] / unit:.3g}" if row.get(key) else "" for key, unit in (("flops", 1e12), ("bytes", 1e9))]
    if row["status"] != "ok":
        gap = [""] * (len(COLUMNS) - len(start) - 1 - len(work) - 3)
        return [*start, f"{row['status']}: {row['reason']}", *gap, *work, "", "", ""]
    ratio = (ours or {}).get("ratio_to", {}).get(row["variant"])
    shares = [f"{row[key]:.0%}" if row.get(key) else "" for key in ("share_of_matmul", "share_of_copy")]
    return [
        *start,
        seconds(row["median_s"]),
        "" if ratio is None else f"{ratio:.2g}",
        memory(row.get("extra_mb")),
        memory(row.get("total_mb")),
        *work,
        *shares,
        f"{row['error']:.2g} ({row['tolerance']:g})" if "error" in row else "",
    ]


def table(machine: dict, rows: list[dict]) -> str:
    """The machine, the rows that were tried, and how many were not and why."""
    ours = {(row["level"], row["name"]): row for row in rows if row["variant"] == "ours"}
    tried = [row for row in rows if row["status"] != NOT_RUN]
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [cells(row, ours.get((row["level"], row["name"]))) for row in tried]
    body = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    reasons = Counter(row["reason"].split(": ")[0] for row in rows if row["status"] == NOT_RUN)
    left = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return f"{headline(machine)}\n\n{body}\n" + (f"\nNot run: {left}.\n" if left else "")


def plot(rows: list[dict], path: Path) -> bool:
    """Time and extra memory against resolution, one column a level; False when no level was done at two resolutions.

    A cross at the upper edge is a row without a time: out of memory, over budget, not run. Versions of which no row of
    a level was tried, such as compiled ones where that is off, are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    sizes = {level: {r["resolution"] for r in rows if r["level"] == level and r["status"] == "ok"} for level in PLOTTED}
    levels = [level for level in PLOTTED if len(sizes[level]) > 1]
    if not levels:
        return False
    variants = list(dict.fromkeys(row["variant"] for row in rows if row["level"] in levels))
    shape = (2, len(levels)) if len(levels) > 1 else (1, 2)
    figure, grid = pyplot.subplots(*shape, figsize=(4 * shape[1], 3.5 * shape[0]), squeeze=False, layout="constrained")
    crossed = False
    quantities = (("median_s", 1, "seconds"), ("extra_mb", 1024, "GB beyond the weights"))
    for column, level in enumerate(levels):
        sides = sorted({row["resolution"] for row in rows if row["level"] == level})
        for axes, (key, unit, quantity) in zip(grid.reshape(2, -1)[:, column], quantities, strict=True):
            height = 0.97  # of the crosses
            for number, variant in enumerate(variants):
                chosen = [r for r in rows if (r["level"], r["variant"]) == (level, variant)]
                if all(r["status"] == NOT_RUN for r in chosen):
                    continue
                done = sorted((r["resolution"], r[key] / unit) for r in chosen if r["status"] == "ok" and r.get(key))
                color = f"C{number}"
                if done:
                    axes.plot(*zip(*done, strict=True), marker="o", color=color, label=variant)
                if missing := [r["resolution"] for r in chosen if r["status"] != "ok"]:
                    crossed, place = True, {"transform": axes.get_xaxis_transform()}
                    label = None if done else variant
                    axes.plot(missing, [height] * len(missing), "x", color=color, label=label, **place)
                    height -= 0.04
            axes.set(xscale="log", yscale="log", xlabel="side, px", ylabel=quantity, title=TITLES[level])
            axes.set_xticks(sides, [str(side) for side in sides], rotation=30)
            axes.margins(x=0.12, y=0.2)  # crosses and legends have room above
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
    if crossed:
        figure.supxlabel("x at the upper edge: out of memory, over its budget or not run; see the table", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    return True


def put_between(text: str, content: str, name: str) -> str:
    """``text`` with ``content`` between the markers.

    Raises:
        UserError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{name} must hold the lines {BEGIN} and {END}, once each and in this order")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + content.strip() + "\n" + text[text.index(END) :]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots of benchmarks.")
    parser.add_argument("results", nargs="+", type=Path, help="what pytest benchmarks/ --benchmark-json=FILE wrote")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file to fill (default: docs/benchmarks.md)")
    args = parser.parse_args(arguments)
    read_all = [(path, *read(path)) for path in args.results]
    try:
        page = args.page.read_text() if args.page.exists() else f"{BEGIN}\n{END}\n"
    except OSError as error:
        raise UserError(f"can't read {args.page}: {error.strerror}") from error
    put_between(page, "", str(args.page))  # complain before anything is written
    parts, plots = [], 0
    for path, machine, rows in read_all:
        part, name = f"### {path.stem}\n\n{table(machine, rows)}", f"{path.stem}.png"
        if plot(rows, args.page.with_suffix("") / name):
            part += f"\n![Time and memory against resolution]({args.page.stem}/{name})\n"
            plots += 1
        parts.append(part)
    with atomic_path(args.page) as temporary:
        temporary.write_text(put_between(page, "\n".join(parts), str(args.page)))
    print(f"{args.page}: {sum(len(rows) for _, _, rows in read_all)} rows, {plots} plots")
    return 0


if __name__ == "__main__":
    run_cli(main)
