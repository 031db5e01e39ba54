#!/usr/bin/env bash
# On a machine with one GPU: build the kernels, check them and the goldens, run every benchmark at the full 6B width with
# random weights, and write benchmarks/results/<gpu>.json with its table and plots, all in under nine minutes.
#
#   benchmarks/gpu.sh                           # needs PyTorch with CUDA, diffusers, pytest-benchmark, matplotlib, nvcc
#   L2P_BENCH_DEVICE=cpu benchmarks/gpu.sh      # the same steps without a GPU, at small sizes
#
# L2P_GOLDENS: folder of the reference tensors (see tests/goldens.py); without them their tests are skipped.
# L2P_BENCH_RESULTS: folder to write to instead. L2P_BENCH_SECONDS: for everything, 530 unless told.
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

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, remember a failure, go on.
step() {
  local name="$1" limit="$2" begun=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=20 "$limit" "$@"
  local code=$?
  echo "== $name: exit code $code after $((SECONDS - begun)) s"
  [ "$code" -eq 0 ] || failed+=("$name ($code)")
}

if [ "$device" = cuda ]; then
  gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name())')" || { echo "PyTorch sees no GPU here"; exit 2; }
  name="$(tr 'A-Z ' 'a-z-' <<<"${gpu#NVIDIA }")"
  TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))')}"
  export TORCH_CUDA_ARCH_LIST L2P_BUILD="${L2P_BUILD:-require}"
  sizes=(--scale full)
else
  name=dry-run
  export L2P_BUILD="${L2P_BUILD:-cpu}"
  sizes=(--scale quick)
fi
results="${L2P_BENCH_RESULTS:-benchmarks/results}"
mkdir -p "$results" || exit 2
unfinished="$(mktemp -d "$results/.unfinished.XXXXXX")" || exit 2
trap 'rm -rf "$unfinished"' EXIT

step "build" 240 "$python" setup.py -q build_ext --inplace
step "info" 60 "$python" -m l2p_fast.info
step "kernels" 120 "$python" -m pytest -q -p no:cacheprovider tests/test_*ops.py tests/test_detailer.py
step "goldens" 60 "$python" -m pytest -q -p no:cacheprovider tests/test_model.py tests/test_pipeline.py -k golden

left=$((seconds - SECONDS - 15)) # the rest is for the report
[ "$left" -ge 60 ] || left=60
step "benchmarks" $((left + 30)) "$python" -m pytest benchmarks -q -p no:cacheprovider -rsf --benchmark-columns=median,rounds \
  "${sizes[@]}" --row-seconds 60 --total-seconds "$left" --benchmark-json="$unfinished/$name.json" "$@"
if [ -s "$unfinished/$name.json" ]; then
  mv "$unfinished/$name.json" "$results/$name.json"
  step "report" 60 "$python" -m benchmarks.report "$results"/*.json --out "$results"
else
  failed+=("no results were written")
fi

echo "== done after $SECONDS s, results in $results"
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
