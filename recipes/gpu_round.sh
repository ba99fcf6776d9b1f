#!/usr/bin/env bash
# All GPU evidence in one call, within one deadline, without a network and without capszoo installed: the GPU tests, which
# also compile what the benchmark then times, the benchmark of the main results, a timed training of capsnet on MNIST
# towards 99.37 % on the test set (the accuracy of FasTrCaps's baseline), the paper's rows at batch 128 beside a short
# cycle, and the rest of the benchmark for as long as there is time.
#
#     bash recipes/gpu_round.sh [OUTPUT_FOLDER] [DATA_FOLDER]      # default runs/gpu_round and data
#     ROUND_SECONDS=1200 bash recipes/gpu_round.sh                 # default 520
#     DEVICE=cpu bash recipes/gpu_round.sh                         # tries every part in little, where there is no GPU
#
# Needs torch, timm, safetensors, rich, pytest, hypothesis and matplotlib; the rows need optuna. DATA_FOLDER has MNIST/raw/*-ubyte, or the same
# files as .gz, which are unpacked elsewhere; without them nothing is trained. OUTPUT_FOLDER gets round.tar.gz with
# versions, logs, tables, figures and results, made anew after each part, and the weights in pieces of 15 MB
# (cat best.safetensors.* > best.safetensors). Exit code 1 if a part failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-runs/gpu_round}"
out=$(cd "${1:-runs/gpu_round}" && pwd)
data=$(cd "${2:-data}" 2>/dev/null && pwd)
cd "$root"
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
total=${ROUND_SECONDS:-520}
deadline=$((SECONDS + total))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
round=$work/round
mkdir -p "$round" "$work/data/MNIST/raw"
rm -f "$out"/best.safetensors.[0-9]* # of an earlier round, which may have had more pieces
# The packages are found from the root, which has links where an installation has folders.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export TRITON_PRINT_AUTOTUNING=1 # the tile sizes chosen, in the logs
failed=0

pack() { # what there is so far, so that a round that is cut short leaves it
    tar -czf "$work/round.tar.gz" -C "$work" --exclude='*.safetensors' round && mv "$work/round.tar.gz" "$out/round.tar.gz"
}

part() { # NAME PERCENT COMMAND...: run a part into its log, and keep so much of the whole time for those after it
    local name=$1 start=$SECONDS left=$((deadline - SECONDS - 10 - total * $2 / 100)) code=0
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "$name: left out, no time" | tee -a "$round/parts.txt"
        return
    fi
    timeout --kill-after=5 "$left" "$@" >"$round/$name.log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed=1
    echo "$name: exit code $code after $((SECONDS - start)) s" | tee -a "$round/parts.txt"
    pack
}

"$python" - "$device" <<'EOP' | tee "$round/versions.txt"
import importlib.metadata, platform, sys
import torch
for name in ("torch", "triton", "timm", "safetensors", "numpy"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")
print("python", platform.python_version())
if sys.argv[1] != "cpu":
    if not torch.cuda.is_available():
        sys.exit("gpu_round.sh needs a CUDA GPU, and torch that sees it; DEVICE=cpu tries it without")
    print("GPU", torch.cuda.get_device_name(), "compute capability", *torch.cuda.get_device_capability())
EOP
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 1
if [ "$device" != cpu ]; then nvidia-smi --query-gpu=driver_version,memory.total --format=csv | tee -a "$round/versions.txt"; fi

models=(capsnet capsnet_ws) sizes=(1 16 128) rounds=(--rounds 15) train=(--model capsnet --epochs 20 --batch-size 128)
rows=("$work"/rows recipes/configs/fast_gpu.yaml) epochs=10
paper=(paper/1-baseline.yaml paper/2-exp_decay.yaml paper/3-one_cycle.yaml paper/4-warm_restarts.yaml paper/7-weight_sharing.yaml)
tests=(tests/kernels tests/test_engine.py tests/data/test_loader.py tests/prune tests/recipes/test_benchmark.py)
if [ "$device" = cpu ]; then
    models=(capsnet_tiny) sizes=(2) rounds=(--rounds 1) train=(--model capsnet_tiny --epochs 1 --batch-size 16)
    rows=("$work"/rows) paper=(paper_tiny/1-baseline.yaml) epochs=1
fi
mkdir "$work/rows" # shorter than the paper's
for row in "${paper[@]}"; do
    sed "s/^epochs:.*/epochs: $epochs/" "recipes/configs/$row" >"$work/rows/$(basename "$row")"
done
left() { # SECONDS until the deadline, beside those to keep
    echo $((deadline - SECONDS > $1 ? deadline - SECONDS - $1 : 1))
}

workers=() # the tests compile side by side
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 14); fi
if [ "$device" = cpu ]; then workers=(); fi
part tests 60 "$python" -m pytest -m gpu -q -rfE -p no:cacheprovider "${workers[@]}" "${tests[@]}"

benchmark=("$python" -m capszoo.recipes.benchmark --device "$device" "${rounds[@]}")
part benchmark-main 35 "${benchmark[@]}" --models "${models[@]}" --subjects routing training --batch-sizes "${sizes[@]}" \
    --compile-batch-sizes --time-limit "$(left $((total * 45 / 100)))" --output "$round/benchmark-main.csv"

for file in train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte; do
    if [ -f "$data/MNIST/raw/$file" ]; then
        ln -s "$data/MNIST/raw/$file" "$work/data/MNIST/raw/$file"
    elif [ -f "$data/MNIST/raw/$file.gz" ]; then
        gunzip -c "$data/MNIST/raw/$file.gz" >"$work/data/MNIST/raw/$file"
    fi
done
if [ -e "$work/data/MNIST/raw/t10k-labels-idx1-ubyte" ]; then
    part training 25 "$python" -m capszoo.recipes.train "${train[@]}" --dataset mnist --data-dir "$work/data" \
        --device "$device" --policy one_cycle --lr 5e-4 --max-lr 4x --rise 0.3 --val-fraction 0.05 --output "$round/mnist"
    if [ -f "$round/mnist/best.safetensors" ]; then split -b 15M -d "$round/mnist/best.safetensors" "$out/best.safetensors."; fi
    if "$python" -c "import optuna" 2>/dev/null; then
        part grid 0 "$python" -m capszoo.recipes.explore --grid "${rows[@]}" --test --data-dir "$work/data" \
            --device "$device" --output "$round/grid" --results "$round/grid.csv"
    else
        echo "grid: left out, no optuna" | tee -a "$round/parts.txt"
    fi
else
    echo "training: left out, no MNIST in '$data'" | tee -a "$round/parts.txt"
fi

if [ "$device" = cpu ]; then
    rest=(--models "${models[@]}" --subjects inference --batch-sizes "${sizes[@]}")
else
    rest=(--time-limit "$(left 45)")
fi
part benchmark 0 "${benchmark[@]}" "${rest[@]}" --data-dir "$work/data" --output "$round/benchmark.csv"
# A benchmark that ran out of time has its table, and no figures.
for table in benchmark-main benchmark; do
    if [ -f "$round/$table.csv" ]; then
        "$python" -m capszoo.recipes.benchmark --plot-only "$round/$table.csv" >>"$round/$table.log" 2>&1 || true
    fi
done

echo
cat "$round/parts.txt"
echo "-- tests"; tail -n 12 "$round/tests.log" 2>/dev/null
echo "-- benchmark"; tail -n 45 "$round/benchmark-main.log" 2>/dev/null | cut -c1-160
echo "-- grid"; tail -n 25 "$round/grid.log" 2>/dev/null | cut -c1-160
if [ -f "$round/mnist/result.json" ]; then
    "$python" - "$round/mnist/result.json" <<'EOP' | tee "$round/training.txt"
import json, sys
result = json.load(open(sys.argv[1]))
reached = "reached" if result["test_top1"] >= 0.9937 else "NOT reached"
print(f"-- training: {result['model']} on MNIST, test top1 {result['test_top1']:.4f} (99.37 % {reached}) after "
      f"{result['epochs']} epochs in {result['total_seconds']:.1f} s")
EOP
fi
pack
exit "$failed"
