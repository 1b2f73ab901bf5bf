#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes and without a network:
#
#     benchmarks/gpu.sh OUT
#
# builds the package in place, runs the tests marked gpu, measures (mosa-kernels bench, first with --choose), and runs
# compute-sanitizer over small calls of every kernel. Each phase has its own limit, and what one breaks leaves the
# others; the exit status is 1 where any did not pass (the counters of dram_bytes apart, which not everybody may read).
# OUT gets summary.md, report.json, report.md, pictures, choice/DEVICE.json (which backend is the fastest for which
# call; in mosa_kernels/assets/choice it is what the package uses on such a device), and all output in logs.tar.gz:
# there, too, phases.json and the reports of two more phases whose tables the summary shows, granularity (experts that
# own whole units or blocks) and one_launch (the CUDA backward pass by thread-block clusters).
#
# MOSA_GPU_SECONDS    what all phases together may take (570)
# MOSA_GPU_PHASES     some of "build tests bench sanitizers" (all)
# MOSA_GPU_BENCH      options of mosa-kernels bench in place of "--preset quick"
# MOSA_COMMIT         the commit that the report names where there is no .git, as in a copy of the files
# MOSA_GPU_SH_DRY=1   the same phases on a CPU with the smallest shapes, to try the script itself
# PYTHON              (python3) with torch, triton, timm, typer, rich, pytest, hypothesis, for pictures matplotlib, and
#                     for the build cmake, ninja, pybind11 and nvcc
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu.sh OUT" >&2
  exit 2
fi
mkdir -p "$1/logs" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
DRY=${MOSA_GPU_SH_DRY:-0}
END=$(($(date +%s) + ${MOSA_GPU_SECONDS:-570}))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
: >"$OUT/logs/phases.tsv"

left() { # SECONDS: as many, or what is left of the whole
  local rest=$((END - $(date +%s)))
  echo $(($1 < rest ? $1 : (rest > 1 ? rest : 1)))
}

phase() { # NAME SECONDS COMMAND...: runs it within its limit, and records how it ended
  local name=$1 limit begun rc
  limit=$(left "$2")
  shift 2
  begun=$(date +%s)
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1 </dev/null
  rc=$?
  printf '%s\t%d\t%d\t%d\n' "$name" "$rc" "$(($(date +%s) - begun))" "$limit" >>"$OUT/logs/phases.tsv"
  echo "   exit status $rc after $(($(date +%s) - begun)) s"
  return "$rc"
}

wanted() { [[ " ${MOSA_GPU_PHASES:-build tests bench sanitizers} " == *" $1 "* ]]; }

mosa=("$PYTHON" -c 'from mosa_kernels.cli.main import app; app()')

if [ "$DRY" = 1 ]; then
  DEVICE=cpu
  export OMP_NUM_THREADS=1
  selected=(--collect-only tests/bench)
else
  DEVICE=cuda
  selected=(tests)
  "$PYTHON" -c 'import xdist' 2>/dev/null && selected+=(-n 6)
  if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  fi
  export TORCH_CUDA_ARCH_LIST
  wanted build && phase build 180 "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
fi

phase doctor 40 "${mosa[@]}" doctor
wanted tests && phase tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --durations=10 "${selected[@]}"

if wanted bench; then
  chosen=(--device cuda --deadline 130)
  [ "$DRY" = 1 ] && chosen=(--device cpu --threads 1 --shapes vit_ti --images 1 --bottlenecks 8 --dtypes fp32 --rounds 3)
  phase choose 150 "${mosa[@]}" bench --choose "${chosen[@]}" --output "$OUT/choice"
fi

if [ "$DRY" = 1 ]; then
  seconds=240
  measured=(--preset smoke --device cpu --threads 1 --only adapter_forward,adapter,merge,masked_adamw)
else
  reserve=$(wanted sanitizers && echo 230 || echo 160) # for the phases after it
  seconds=$(($(left 3600) - reserve > 60 ? $(left 3600) - reserve : 60))
  read -ra measured <<<"${MOSA_GPU_BENCH:---preset quick}"
  measured+=(--device cuda)
fi
wanted bench &&
  phase bench "$seconds" "${mosa[@]}" bench "${measured[@]}" --deadline $((seconds * 8 / 10)) --output "$OUT"

if wanted bench && [ "$DRY" != 1 ]; then # what memory really moved, where the profiler may read its counters
  phase dram_bytes 60 "$PYTHON" benchmarks/dram_bytes.py "$OUT/logs/dram_bytes.json"
  # the CUDA backend's backward pass by thread-block clusters, beside the same eager PyTorch as above
  one_launch=(--preset quick --only adapter_backward --providers eager,cuda --device cuda --deadline 40)
  phase one_launch 50 env MOSA_CUDA_ONE_LAUNCH=1 "${mosa[@]}" bench "${one_launch[@]}" --output "$OUT/logs/one_launch"
fi
if wanted bench; then # what it brings that an expert owns whole units or blocks
  kinds=(--only granularity --bottlenecks 128,256 --dtypes bf16 --expert-per call --device cuda --deadline 40)
  [ "$DRY" = 1 ] && kinds=(--only granularity --preset smoke --device cpu --threads 1)
  phase granularity 50 "${mosa[@]}" bench "${kinds[@]}" --output "$OUT/logs/granularity"
fi

if wanted sanitizers; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # the allocator's cache would hide an access beyond the end of a tensor
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  small=("$PYTHON" benchmarks/small_calls.py --device "$DEVICE")
  phase small_calls 60 "${small[@]}" # compiles what the sanitizers then find in Triton's cache
  if [ -z "$sanitizer" ] || [ "$DRY" = 1 ]; then
    echo "compute-sanitizer is not run: $([ "$DRY" = 1 ] && echo a dry run || echo it is not installed)"
  else
    for tool in memcheck racecheck initcheck; do # side by side: each is slow by itself
      phase "$tool" 120 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${small[@]}" &
    done
    for tool in memcheck synccheck; do # racecheck does not follow the shared memory of other blocks
      phase "${tool}_one_launch" 120 env MOSA_CUDA_ONE_LAUNCH=1 \
        "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${small[@]}" &
    done
    wait
  fi
fi

"$PYTHON" benchmarks/gpu_summary.py "$OUT"
