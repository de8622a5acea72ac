#!/usr/bin/env bash
# What launch/tpu_vm.sh does on each worker, in the directory of the code:
#   setup      Python 3.11 and the packages
#   start ...  the run in the background, unless it is there; log in ./log
#   state      done, 'failed CODE', running or idle
#   stop       asks the run to save and end
set -euo pipefail
cd "$(dirname "$0")/.."
KEYS=${KEYS:-$HOME/exectune.keys}

running() { kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; }

case ${1:-} in
  setup)
    chmod 600 "$KEYS"
    python3 -m pip install -q --user uv
    python3 -m uv venv -q --allow-existing --python 3.11 .venv
    python3 -m uv pip install -q --python .venv/bin/python -e '.[tpu]' \
      -c constraints.txt ;;
  start)
    running && exit
    rm -f pid code
    setsid nohup launch/worker.sh stay "${@:2}" >>log 2>&1 </dev/null &
    until [[ -s pid ]] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done ;;
  stay)  # beside the run, for its exit code
    # shellcheck source=/dev/null
    . "$KEYS"
    .venv/bin/python -m exectune_jax.main "${@:2}" --config.mesh.hosts=0 &
    echo $! >pid
    code=0
    wait $! || code=$?
    echo $code >code ;;
  state)
    if running; then echo running
    elif [[ ! -f code ]]; then echo idle
    elif [[ $(<code) == 0 ]]; then echo 'done'
    else echo "failed $(<code)"; fi ;;
  stop) ! running || kill -TERM "$(<pid)" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
