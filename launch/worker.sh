#!/usr/bin/env bash
# What launch/tpu_vm.sh does on each worker, in the directory of the code:
#   setup      Python 3.11 and the packages
#   start ...  main with these flags in the background; log in ./log. Leaves a
#              run with the same flags alone, ends one with others first.
#   state ...  of the run with these flags, or with any: done, 'failed CODE',
#              running, idle, or bare before setup
#   stop       lets the run save and end, and kills it if it does not
set -euo pipefail
cd "$(dirname "$0")/.."
KEYS=${KEYS:-$HOME/exectune.keys} STOP_S=${STOP_S:-120}
BOOT=$(</proc/sys/kernel/random/boot_id)  # pids mean nothing after a reboot

running() { [[ $(cat boot 2>/dev/null) == "$BOOT" ]] &&
  kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; }
same() { [[ $# == 0 || $(printf '%s\0' "$@" | sha256sum) == \
  $(cat flags 2>/dev/null) ]]; }
stop() {
  running || return 0
  kill -TERM "$(<pid)"
  for _ in $(seq $((STOP_S * 5))); do running || return 0; sleep 0.2; done
  kill -KILL "$(<pid)"
}

action=${1:-}
shift || true
case $action in
  setup)
    chmod 600 "$KEYS"
    python3 -m pip install -q --user uv
    python3 -m uv venv -q --allow-existing --python 3.11 .venv
    python3 -m uv pip install -q --python .venv/bin/python \
      -e '.[tpu,anthropic]' -c constraints.txt
    # Only code tasks need it, and refuse to begin without it.
    command -v bwrap >/dev/null || sudo apt-get install -yq bubblewrap ||
      echo 'no bubblewrap: code tasks will not run'
    touch ready ;;
  start)
    running && same "$@" && exit
    stop
    rm -f pid code
    printf '%s\0' "$@" | sha256sum >flags
    echo "$BOOT" >boot
    setsid nohup launch/worker.sh stay "$@" >>log 2>&1 </dev/null &
    until [[ -s pid ]] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done ;;
  stay)  # beside the run, for its exit code
    # shellcheck source=/dev/null
    . "$KEYS"
    .venv/bin/python -m exectune_jax.main "$@" --config.mesh.hosts=0 &
    echo $! >pid
    code=0
    wait $! || code=$?
    echo $code >code ;;
  state)
    if [[ ! -f ready ]]; then echo bare
    elif ! same "$@"; then echo idle
    elif running; then echo running
    elif [[ ! -f code ]]; then echo idle
    elif [[ $(<code) == 0 ]]; then echo 'done'
    else echo "failed $(<code)"; fi ;;
  stop) stop ;;
  *) sed -n '2,8s/^# \{0,1\}//p' launch/worker.sh; exit 2 ;;
esac
