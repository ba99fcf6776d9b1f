#!/usr/bin/env bash
# All GPU evidence in one call, within one deadline: recipes/gpu_round.py says what, how and where to.
#
#     bash recipes/gpu_round.sh [OUTPUT_FOLDER] [DATA_FOLDER]      # default runs/gpu_round and data
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_round.py" "$@"
