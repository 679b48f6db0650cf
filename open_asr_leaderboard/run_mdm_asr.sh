#!/usr/bin/env bash
# The leaderboard's public data sets of short English clips, one after the other. On one GPU:
#     MODEL_ID=owner/name bash run_mdm_asr.sh
# Inside a clone of the leaderboard's repository its own normaliser is used, and its own table printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONPATH="..${PYTHONPATH:+:$PYTHONPATH}"

BATCH_SIZE=${BATCH_SIZE:-64}
DEVICE=${DEVICE:-0}
DATASET_PATH=${DATASET_PATH:-hf-audio/open-asr-leaderboard}

# ── Models: commit, branch or tag after the "@" ─────────────────────────────
read -r -a MODEL_IDS <<< "${MODEL_ID:?set it to the checkpoints to measure: folders or ids}"

# ── Data sets: "name split [path]" ──────────────────────────────────────────
DATASET_CONFIGS=(
    "ami_cleaned test"
    "gigaspeech_cleaned test"
    "voxpopuli_cleaned_aa test"
    "librispeech test.clean"
    "librispeech test.other"
    "spgispeech test"
)
# Whole calls as references: only the leaderboard's own package puts its chunks together.
if python -c "import normalizer" 2> /dev/null; then
    DATASET_CONFIGS+=("earnings22_cleaned_aa_chunked test ArtificialAnalysis/Earnings22-Cleaned-AA-chunked")
fi

for MODEL in "${MODEL_IDS[@]}"; do
    REVISION=()
    if [[ "$MODEL" == *@* ]]; then REVISION=(--revision "${MODEL#*@}"); fi
    for config in "${DATASET_CONFIGS[@]}"; do
        read -r DATASET SPLIT ITS_PATH <<< "$config"
        python run_eval.py \
            --model_id "${MODEL%@*}" "${REVISION[@]}" \
            --dataset_path "${ITS_PATH:-$DATASET_PATH}" \
            --dataset "$DATASET" \
            --split "$SPLIT" \
            --device "$DEVICE" \
            --batch_size "$BATCH_SIZE" \
            --max_eval_samples -1 \
            "$@"
    done
    if python -c "import normalizer" 2> /dev/null; then
        python -c "import sys; from normalizer.eval_utils import score_results; score_results('results', sys.argv[1])" "${MODEL%@*}"
    fi
done
