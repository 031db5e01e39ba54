#!/usr/bin/env bash
# On a machine with one GPU: build the kernels, check them, and measure everything at the full 6B width with random
# weights, what matters most first: the first four minutes hold the checks, the head, a 4K step and a training step.
#
#   benchmarks/gpu.sh                           # needs PyTorch with CUDA, pytest-benchmark and nvcc
#   L2P_BENCH_DEVICE=cpu benchmarks/gpu.sh      # the same steps without a GPU, at small sizes
#
# A package that is missing (diffusers, bitsandbytes, matplotlib) costs the rows that need it, and they say so.
# L2P_WHEELS: folder of wheels to install for this run alone. OUT: folder for one JSON with everything, kept up to date.
# L2P_BENCH_RESULTS: folder of the results (benchmarks/results). L2P_BENCH_SECONDS: for everything, 530 unless told.
# Further arguments go to the benchmarks' pytest: -k head.
# A failed step or row stops nothing; the last lines say what failed, and the exit code is 1 then.
set -u
cd "$(dirname "$0")/.." || exit 1

device="${L2P_BENCH_DEVICE:-cuda}"
seconds="${L2P_BENCH_SECONDS:-530}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export L2P_BENCH_DEVICE="$device"
failed=()

results="${L2P_BENCH_RESULTS:-benchmarks/results}"
mkdir -p "$results" || exit 2
work="$(mktemp -d "$results/.unfinished.XXXXXX")" || exit 2
touch "$work/steps.jsonl" "$work/rows.jsonl"

# One JSON of all that is known so far, whatever ends this run.
collect() {
  [ -n "${OUT:-}" ] && "$python" - "$work" "$OUT" <<'PYTHON'
import json, os, sys
from pathlib import Path
work, out = map(Path, sys.argv[1:])
read = lambda name: [json.loads(line) for line in (work / name).read_text().splitlines()]
found = {"steps": read("steps.jsonl"), "rows": read("rows.jsonl")}
found |= {"pytest_benchmark": json.loads(path.read_text()) for path in work.glob("*.json") if path.stat().st_size}
temporary = out / ".gpu.json.new"
temporary.write_text(json.dumps(found, indent=1))
os.replace(temporary, out / "gpu.json")
PYTHON
}
trap 'collect; rm -rf "$work"' EXIT
trap 'exit 143' TERM INT

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, note how it ended, go on.
step() {
  local name="$1" limit="$2" begun=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=20 "$limit" "$@" 2>&1 | tee "$work/said"
  local code=${PIPESTATUS[0]}
  echo "== $name: exit code $code after $((SECONDS - begun)) s"
  [ "$code" -eq 0 ] || failed+=("$name ($code)")
  "$python" -c 'import json, sys
name, code, seconds, said = sys.argv[1:]
print(json.dumps({"step": name, "code": int(code), "seconds": int(seconds), "said": open(said, errors="replace").read()[-4000:]}))
' "$name" "$code" "$((SECONDS - begun))" "$work/said" >>"$work/steps.jsonl"
  collect
}

if [ -n "${L2P_WHEELS:-}" ]; then
  step "wheels" 120 "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$L2P_WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$work/site"
fi

if [ "$device" = cuda ]; then
  gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name())')" || { echo "PyTorch sees no GPU here"; exit 2; }
  name="$(tr 'A-Z ' 'a-z-' <<<"${gpu#NVIDIA }")"
  TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))')}"
  export TORCH_CUDA_ARCH_LIST L2P_BUILD="${L2P_BUILD:-require}"
  sizes=(--scale full) kernels="CUDA kernels" to=(--inplace)
  tests=(tests/test_*ops.py tests/test_detailer.py)
else
  name=dry-run
  export L2P_BUILD="${L2P_BUILD:-cpu}"
  # Aside: a dry run leaves the CUDA kernels of this folder as they are.
  sizes=(--scale quick) kernels="loaded" to=(--build-lib "$work/build" --build-temp "$work/build")
  tests=(tests/test_update_ops.py)
fi

step "build" 240 "$python" setup.py -q build_ext "${to[@]}"
step "status" 60 "$python" -c '
import sys
from l2p_fast import ops
status = ops.extension_status()
print(status)
sys.exit(sys.argv[1] not in status)' "$kernels"
step "kernels" 120 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
goldens=("$python" -m pytest -q -p no:cacheprovider tests/test_model.py tests/test_pipeline.py -k golden)
"$python" -c 'import diffusers' 2>/dev/null || goldens=(echo "left out: diffusers is missing")
step "goldens" 60 "${goldens[@]}"

left=$((seconds - SECONDS - 15)) # the rest is for the report
[ "$left" -ge 30 ] || left=30
step "benchmarks" $((left + 30)) "$python" -m pytest benchmarks -q -p no:cacheprovider -rsf --continue-on-collection-errors \
  --benchmark-columns=median,rounds "${sizes[@]}" --row-seconds 60 --total-seconds "$left" \
  --rows "$work/rows.jsonl" --benchmark-json="$work/$name.json" "$@"
if [ -s "$work/$name.json" ]; then
  cp "$work/$name.json" "$results/$name.json"
  step "report" 60 "$python" -m benchmarks.report "$results"/*.json --page "$results/table.md"
else
  failed+=("no results were written")
fi

echo "== done after $SECONDS s, results in $results"
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
