"""``python -m tests.cuda_on_cpu plain|race|asan [TEST ...]``: the ops' tests on one build of the emulated CUDA kernels.

plain   what every test run does
race    every access to memory is checked for races
asan    AddressSanitizer and UndefinedBehaviorSanitizer

``python -m tests.cuda_on_cpu mutants [plain|race|asan ...]``: what finds which planted mistake.
``python -m tests.cuda_on_cpu fuzz plain|race|asan [SECONDS [SEED]]``: random shapes, strides, offsets and dtypes.
"""

from __future__ import annotations

import subprocess
import sys
import time

from . import mutants
from .build import KINDS, ROOT, build, obstacle
from .suite import environment, run, run_all


def main(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command not in (*KINDS, "mutants", "fuzz") or (command == "fuzz" and (not rest or rest[0] not in KINDS)):
        print(__doc__)
        return 2
    if problem := obstacle():
        print(f"the kernels can't be run here: {problem}")
        return 1
    if command == "mutants":
        return 0 if mutants.report(tuple(rest) or mutants.ALL) else 1
    if command == "fuzz":
        library = build(rest[0])
        return subprocess.call(
            [sys.executable, "-m", "tests.cuda_on_cpu.fuzz", *rest[1:]], cwd=ROOT, env=environment(library)
        )
    start = time.perf_counter()
    library = build(command)
    built = time.perf_counter()
    if any(not argument.startswith("-") for argument in rest):
        done = run(library, *rest)
        failed, said = done.returncode, done.stdout + done.stderr
    else:
        failed, said = run_all(library, *rest)
    print(said)
    print(f"built in {built - start:.0f} s, run in {time.perf_counter() - built:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
