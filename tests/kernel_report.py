"""What the compiler says of every CUDA kernel, read from the built extension: the table `kernel_report.csv`.

``python -m tests.kernel_report``: prints what differs from the table. ``--write``: writes it anew. Needs an extension
built for all of `ARCHITECTURES`, and NVIDIA's cuobjdump and nvdisasm, of the CUDA toolkit or of the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from l2p_fast import ops

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
TABLE = Path(__file__).with_suffix(".csv")


class Row(NamedTuple):
    """One kernel on one architecture. The first five are the worse the larger they are, the others the smaller."""

    registers: int
    stack: int  # bytes a thread, for arrays that are not in registers and for calls
    spills: int  # instructions that read or write the stack
    shared: int  # bytes a block, static
    inner: int  # instructions for 100 on tensor cores, in the longest stretch of these
    load: int  # bits, the widest from global memory
    store: int
    tensor: int  # instructions on tensor cores


def tools() -> str | None:
    """A PATH that has cuobjdump and nvdisasm. None: there are none."""
    folders = [Path(folder) / "nvidia" for folder in sys.path]
    packaged = [str(path) for folder in folders if folder.is_dir() for path in folder.glob("*/bin")]
    path = os.pathsep.join([*packaged, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return path if all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")) else None


def obstacle() -> str | None:
    """Why there is nothing to read. None: there is."""
    if missing := set(ARCHITECTURES) - set(ops.build_info().get("cuda_architectures", [])):
        return f"the extension has no kernels for {' '.join(sorted(missing))}"
    return None if tools() else "no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"


def compiler() -> str:
    return f"nvcc {ops.build_info()['cuda']}"


def dump(option: str, library: Path) -> str:
    command = ["cuobjdump", option, str(library)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": tools() or ""}
    ).stdout


def plain_names(mangled: list[str]) -> dict[str, str]:
    """``norm_cuda.cu forward_kernel<float, 4, true>`` of each mangled name."""
    said = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for before, after in zip(mangled, said.splitlines(), strict=True):
        file = re.search(r"_\d+_([a-z]\w*?)_cu_[0-9a-f]{8}", before)
        name = re.search(r"(\w+(?:<.*>)?)\(", after.replace("(anonymous namespace)::", "").replace("l2p::", ""))
        names[before] = f"{file[1] if file else '?'}.cu {name[1] if name else before}"
    return names


def read(library: Path) -> dict[tuple[str, str], Row]:
    """(kernel, architecture) -> what the compiler made of it."""
    resources, code, where = {}, {}, ""
    for line in dump("--dump-resource-usage", library).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            where = found[1]
        elif found := re.match(r" Function (\w+):", line):
            function = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            resources[function, where] = tuple(map(int, found.groups()))
    interesting = r"^arch = (\w+)|Function : (\w+)|^\s+/\*([0-9a-f]{4,})\*/ +(?:@\S+ +)?(LDG|STG|LDL|STL|\w*MMA)(\S*)"
    products: dict[tuple[str, str], list[int]] = {}
    for found in re.finditer(interesting, dump("--dump-sass", library), re.M):
        where, function = found[1] or where, found[2] or function
        counts = code.setdefault((function, where), dict(load=0, store=0, spills=0, tensor=0, inner=0))
        if found[4] in ("LDG", "STG"):
            bits = re.findall(r"\.[US]?(8|16|32|64|128|256)\b", found[5])
            kind = "load" if found[4] == "LDG" else "store"
            counts[kind] = max(counts[kind], int(bits[-1]) if bits else 32)
        elif found[4] in ("LDL", "STL"):
            counts["spills"] += 1
        elif found[4]:
            counts["tensor"] += 1
            products.setdefault((function, where), []).append(int(found[3], 16) // 16)
    for key, places in products.items():
        code[key]["inner"] = per_product(places)
    names = plain_names(sorted({function for function, _ in resources}))
    rows = {}
    for (function, where), (registers, stack, shared) in resources.items():
        if where in ARCHITECTURES:
            # from sm_90 on, 1 KB of every block is the system's
            own = shared - 1024 if where != "sm_80" and shared >= 1024 else shared
            rows[names[function], where] = Row(registers, stack, shared=own, **code[function, where])
    return rows


def per_product(places: list[int]) -> int:
    """Instructions for 100 products, by the products' places: in the longest stretch that others don't interrupt."""
    stretches = [[places[0]]]
    for before, place in itertools.pairwise(places):
        if place - before > 32:
            stretches.append([])
        stretches[-1].append(place)
    longest = max(stretches, key=len)
    return -(-100 * (longest[-1] - longest[0] + 1) // len(longest))


def write(rows: dict[tuple[str, str], Row], file: Path = TABLE) -> None:
    """A line for each kernel: one number where the architectures agree, else one for each."""
    with file.open("w", newline="") as out:
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow([f"kernel ({compiler()}; {' '.join(ARCHITECTURES)})", *Row._fields])
        for name in sorted({name for name, _ in rows}):
            columns = zip(*(rows[name, where] for where in ARCHITECTURES), strict=True)
            lines.writerow([name, *(" ".join(map(str, c if len(set(c)) > 1 else c[:1])) for c in columns)])


def recorded(file: Path = TABLE) -> tuple[str, dict[tuple[str, str], Row]]:
    """The compiler of the table, and its rows."""
    rows = {}
    with file.open() as given:
        head, *lines = csv.reader(given)
    for name, *cells in lines:
        columns = [[int(value) for value in cell.split()] for cell in cells]
        for i, where in enumerate(ARCHITECTURES):
            rows[name, where] = Row(*(column[i if len(column) > 1 else 0] for column in columns))
    return head[0].partition("(")[2].partition(";")[0], rows


def differences(now: dict[tuple[str, str], Row], before: dict[tuple[str, str], Row], same: bool) -> list[str]:
    """What got worse. ``same``: the compiler is the table's; another one may take other registers."""
    found = [f"{name}: not in {TABLE.name}" for name in sorted({name for name, _ in now.keys() - before.keys()})]
    found += [f"{name}: in {TABLE.name} alone" for name in sorted({name for name, _ in before.keys() - now.keys()})]
    for (name, where), row in sorted(now.items()):
        for i, (field, got) in enumerate(row._asdict().items()):
            had = before.get((name, where), row)[i]
            worse = got > had if i < 5 else (field != "tensor" or got == 0) and got < had
            if worse and (same or field not in ("registers", "stack", "shared", "inner")):
                found.append(f"{name} on {where}: {field} {got}, in the table {had}")
    return found


if __name__ == "__main__":
    if problem := obstacle():
        sys.exit(problem)
    found = read(ops._PACKAGE / "_C.abi3.so")
    if sys.argv[1:] == ["--write"]:
        write(found)
    else:
        made_by, rows = recorded()
        print("\n".join(differences(found, rows, made_by == compiler())) or "no kernel is worse than in the table")
