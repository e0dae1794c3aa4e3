#!/usr/bin/env bash
# Everything that only a GPU can measure, in one command:
#
#   pip install -e ".[dev]" && bash benchmarks/on_gpu.sh
#
# First the notebooks' cells that need a GPU, then a table of plans for experts, then the benchmarks, which leave their
# figures in benchmarks/results/*_gpu.json. A command that fails is named at the end; the others run all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=benchmarks/results failed=()
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "on_gpu.sh: torch sees no GPU")' || exit 1

run() { echo "== $*"; "$@" || failed+=("$*"); }

run pytest -n0 tests/test_notebooks.py --nb_flags cuda
export TPA_CACHE="$(mktemp -d)"  # where the table is looked for by what comes after it
run python -c "from tpa_nb.experts import calibrate_plans
calibrate_plans(device='cuda', tokens=(1, 8, 64, 512, 8192))"
run cp "$TPA_CACHE/plans.json" "$out/plans_gpu.json"
run tpa_bench --device cuda --dtypes float32,bfloat16 --shares 0.2 --tokens 1,8,64,512,8192 \
    --sizes small,base,large,3b --compile --output_dir "$out/bench_gpu"
run tpa_bench --device cuda --dtypes bfloat16 --d_model 1024 --d_ff 16384 --n_experts 128,512 --tokens 1,8 \
    --output_dir "$out/bench_decoding_gpu"
run python benchmarks/whole_t5.py --device cuda --sizes small base large 3b --batch 64x128 --out "$out/whole_t5_gpu.json"
run python benchmarks/fused.py --device cuda --shapes 32x128 256x128 --dtypes float32 bfloat16 \
    --out "$out/fused_gpu.json"
run python benchmarks/pruned_forward.py --device cuda --shapes 32x128 64x128 --dtypes float32 bfloat16 \
    --out "$out/pruned_forward_gpu.json"
run python benchmarks/efficiency.py --device cuda --dtypes float32 bfloat16 --out "$out/efficiency_gpu.json"
run python benchmarks/dsee.py --device cuda --layers 12 --batch_size 32 --out "$out/dsee_gpu.json"

for one in "${failed[@]}"; do echo "failed: $one" >&2; done
exit "${#failed[@]}"
