#!/usr/bin/env bash
# Everything that needs a GPU, without a network, in under ten minutes: benchmarks/gpu.sh OUT. Two calls, with a folder
# for each, leave the measurements all the time that they want:
#
#     MOSA_GPU_PHASES="build tests sanitizers" benchmarks/gpu.sh CHECKED
#     MOSA_GPU_PHASES="build bench" benchmarks/gpu.sh OUT
#
# It builds the package in place, runs the tests marked gpu and small calls of every kernel under compute-sanitizer, and
# measures (mosa-kernels bench, first with --choose). Each phase has its own limit, and what one breaks leaves the
# others; the exit status is 1 where any did not pass (the counters of dram_bytes apart, which not everybody may read).
# OUT gets summary.md, report.json, report.md, pictures, choice/DEVICE.json (which backend is the fastest for which
# call; in mosa_kernels/assets/choice it is what the package uses on such a device), and all output in logs.tar.gz:
# there, too, phases.json and the reports of further phases whose tables the summary shows, granularity (experts that
# own whole units or blocks), one_launch (the CUDA backward pass by thread-block clusters), and triton_one_launch beside
# triton_three_launches (Triton's backward pass at r = 16).
#
# MOSA_GPU_SECONDS    what all phases together may take, or the last ones are cut short or left out (570)
# MOSA_GPU_PHASES     some of "build tests sanitizers bench" (all), which run in this order
# MOSA_GPU_BENCH      options of mosa-kernels bench in place of "--preset quick"
# MOSA_COMMIT         the commit that the report names where there is no .git, as in a copy of the files
# MOSA_GPU_SH_DRY=1   the same phases on a CPU with the smallest shapes, to try the script itself
# PYTHON              (python3) with torch, triton, timm, typer, rich, pytest, hypothesis, for pictures matplotlib, for
#                     tests in parallel pytest-xdist, and for the build cmake, ninja, pybind11 and nvcc
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu.sh OUT" >&2
  exit 2
fi
PHASES="build tests sanitizers bench"
for name in ${MOSA_GPU_PHASES:-}; do # a word that names none would leave the time on the GPU unused
  if [[ " $PHASES " != *" $name "* ]]; then
    echo "MOSA_GPU_PHASES: expected some of $PHASES, got $name" >&2
    exit 2
  fi
done
mkdir -p "$1/logs" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
DRY=${MOSA_GPU_SH_DRY:-0}

wanted() { [[ " ${MOSA_GPU_PHASES:-$PHASES} " == *" $1 "* ]]; }

END=$(($(date +%s) + ${MOSA_GPU_SECONDS:-570}))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
: >"$OUT/logs/phases.tsv"

left() { # SECONDS: as many, or what is left of the whole, but at least one: of none, timeout makes no limit
  local rest=$((END - $(date +%s)))
  rest=$(($1 < rest ? $1 : rest))
  echo $((rest > 1 ? rest : 1))
}

ending=(--kill-after=10)

phase() { # NAME SECONDS COMMAND...: runs it within its limit, and records how it ended
  local name=$1 limit begun rc
  limit=$(left "$2")
  shift 2
  begun=$(date +%s)
  echo "== $name (at most $limit s)"
  timeout "${ending[@]}" "$limit" "$@" >"$OUT/logs/$name.log" 2>&1 </dev/null
  rc=$?
  printf '%s\t%d\t%d\t%d\n' "$name" "$rc" "$(($(date +%s) - begun))" "$limit" >>"$OUT/logs/phases.tsv"
  echo "   exit status $rc after $(($(date +%s) - begun)) s"
  return "$rc"
}

further() { # the same for a phase that is left out where its time is not left
  if [ "$(left "$2")" -lt $(($2 - 3)) ]; then
    echo "$1 is not run: its $2 s are not left"
  else
    phase "$@"
  fi
}

mosa=("$PYTHON" -c 'from mosa_kernels.cli.main import app; app()')

if [ "$DRY" = 1 ]; then
  DEVICE=cpu
  export OMP_NUM_THREADS=1
  selected=(--collect-only tests/bench)
  alone=(--collect-only)
else
  DEVICE=cuda
  if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  fi
  export TORCH_CUDA_ARCH_LIST
  # A build that fails with CUDA goes on without, which is a failure here, and pip has to be told to show its output.
  build='"$1" -m pip install --verbose --no-build-isolation --no-deps --editable . && "$1" -c "$0"'
  built='import sys; from mosa_kernels._extension import extension; sys.exit(extension().cuda_reason)'
  wanted build && phase build 180 bash -c "$build" "$built" "$PYTHON"
fi

[ -e .git ] || [ -n "${MOSA_COMMIT:-}" ] || echo "no report will name a commit: there is no .git, and no MOSA_COMMIT"
phase doctor 40 "${mosa[@]}" doctor

if wanted tests; then
  if [ "$DRY" != 1 ]; then
    # Not every worker has to import the other files. cuda_machine.py has marks for those who import it.
    mapfile -t selected < <(grep -rlE --include='test_*.py' 'pytest\.mark\.gpu|^from cuda_machine' tests)
    # a worker takes a core, and 2 GiB of the GPU at most times
    workers='min(available_cores() - 2, torch.cuda.mem_get_info()[0] >> 31)'
    workers=$("$PYTHON" -c "import torch; from mosa_kernels._machine import available_cores; print(max(1, $workers))")
    "$PYTHON" -c 'import xdist' 2>/dev/null && selected+=(-n "${workers:-1}")
    alone=()
  fi
  # Interrupted, pytest prints what failed until then, also where this script runs in the background, whose children
  # ignore interrupts; workers that hang it gives up after 10 s.
  heeding='from signal import *; import pytest; signal(SIGINT, default_int_handler); raise SystemExit(pytest.main())'
  pytest=(env OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=gpu COLUMNS=240 "$PYTHON" -c "$heeding")
  pytest+=(-v -m gpu -p no:cacheprovider)
  timing=tests/bench/test_timing.py::test_times_on_a_gpu_are_those_of_the_device
  ending=(--signal=INT --kill-after=20)
  phase tests 150 "${pytest[@]}" --durations=10 --deselect "$timing" "${selected[@]}"
  phase tests_alone 30 "${pytest[@]}" "${alone[@]}" "$timing" # it compares times, which other work on the GPU changes
  ending=(--kill-after=10)
fi

if wanted sanitizers; then
  uncached=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1) # the allocator's cache would hide an access beyond a tensor's end
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  small=("$PYTHON" benchmarks/small_calls.py --device "$DEVICE")
  phase small_calls 100 "${uncached[@]}" "${small[@]}" # compiles what the sanitizers then find in Triton's cache
  if [ -z "$sanitizer" ] || [ "$DRY" = 1 ]; then
    echo "compute-sanitizer is not run: $([ "$DRY" = 1 ] && echo a dry run || echo it is not installed)"
  else
    for tool in memcheck racecheck initcheck; do # side by side: each is slow by itself
      phase "$tool" 120 "${uncached[@]}" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${small[@]}" &
    done
    for tool in memcheck synccheck; do # racecheck does not follow the shared memory of other blocks
      phase "${tool}_one_launch" 120 "${uncached[@]}" MOSA_CUDA_ONE_LAUNCH=1 \
        "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${small[@]}" &
    done
    wait
  fi
fi

if wanted bench; then
  seconds=$(($(left 450) / 3 + 1))
  chosen=(--device cuda --deadline $((seconds * 8 / 10 + 1)))
  small=(--shapes vit_ti --images 1 --bottlenecks 8 --dtypes fp32)
  [ "$DRY" = 1 ] && chosen=(--device cpu --threads 1 "${small[@]}" --rounds 3)
  phase choose $seconds "${mosa[@]}" bench --choose "${chosen[@]}" --output "$OUT/choice"
fi

BYTES=60 CLUSTERS=50 TRITON=35 KINDS=50 # seconds of the phases after bench
if [ "$DRY" = 1 ]; then
  seconds=240
  measured=(--preset smoke --device cpu --threads 1 --only adapter_forward,adapter,merge,masked_adamw)
else
  seconds=$(($(left 3600) - BYTES - CLUSTERS - 2 * TRITON - KINDS))
  seconds=$(left $((seconds > 180 ? seconds : 180))) # it matters more than what comes after it
  read -ra measured <<<"${MOSA_GPU_BENCH:---preset quick}"
  measured+=(--device cuda)
fi
wanted bench &&
  phase bench "$seconds" "${mosa[@]}" bench "${measured[@]}" --deadline $((seconds * 8 / 10)) --output "$OUT"

if wanted bench && [ "$DRY" != 1 ]; then # what memory really moved, where the profiler may read its counters
  further dram_bytes $BYTES "$PYTHON" benchmarks/dram_bytes.py "$OUT/logs/dram_bytes.json"
  backward=(bench --only adapter_backward --device cuda)
  # the CUDA backend's backward pass by thread-block clusters, beside the same eager PyTorch as above
  clusters=(--preset quick --providers eager,cuda --deadline $((CLUSTERS - 10)) --output "$OUT/logs/one_launch")
  further one_launch $CLUSTERS env MOSA_CUDA_ONE_LAUNCH=1 "${mosa[@]}" "${backward[@]}" "${clusters[@]}"
  # Triton's, which is for narrow bottlenecks, beside its own three launches
  for launches in three_launches:0 one_launch:16; do
    narrow=(--bottlenecks 16 --providers eager,triton --deadline $((TRITON - 10)))
    further "triton_${launches%:*}" $TRITON env MOSA_TRITON_ONE_LAUNCH="${launches#*:}" \
      "${mosa[@]}" "${backward[@]}" "${narrow[@]}" --output "$OUT/logs/triton_${launches%:*}"
  done
fi
if wanted bench; then # what it brings that an expert owns whole units or blocks
  kinds=(--only granularity --bottlenecks 128,256 --dtypes bf16 --expert-per call)
  kinds+=(--device cuda --deadline $((KINDS - 10)))
  [ "$DRY" = 1 ] && kinds=(--only granularity --preset smoke --device cpu --threads 1)
  further granularity $KINDS "${mosa[@]}" bench "${kinds[@]}" --output "$OUT/logs/granularity"
fi

"$PYTHON" benchmarks/gpu_summary.py "$OUT"
