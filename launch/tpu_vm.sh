#!/usr/bin/env bash
# A run on Cloud TPU VMs, one worker or many, on demand or spot:
#   launch/tpu_vm.sh create NAME [--type v6e-8] [--zone us-east5-b] [--spot]
#   launch/tpu_vm.sh setup NAME        this commit, Python, packages, keys
#   launch/tpu_vm.sh run NAME -- --config FILE --workdir gs://BUCKET/DIR ...
#       on all workers; stays until it is done and begins again after a
#       preemption. The same command watches a run that goes on.
#   launch/tpu_vm.sh status|logs|stop|delete NAME
# Also: --project ID, --runtime VERSION, --dry-run (prints every command).
# Keys of the environment (GEMINI_API_KEY, ...) reach the workers in a file
# that only their user can read.
set -euo pipefail
cd "$(dirname "$0")/.."

KEYS=(GEMINI_API_KEY OPENAI_API_KEY ANTHROPIC_API_KEY EXECTUNE_CORE_API_KEY
      HF_TOKEN)
POLL_S=${POLL_S:-30} RETRIES=${RETRIES:-20} STATE=${STATE:-runs/tpu_vm}

die() { echo "error: $*" >&2; exit 1; }
usage() { sed -n '2,11s/^# \{0,1\}//p' launch/tpu_vm.sh; exit 2; }

ACTION=${1:-} NAME=${2:-}
[[ $ACTION =~ ^(create|setup|run|status|logs|stop|delete)$ ]] || usage
[[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || die "NAME='$NAME': small letters, digits, -"
shift 2
TYPE=v6e-8 ZONE=us-east5-b SPOT='' PROJECT='' RUNTIME='' DRY=''
# What `create` was told holds for the other commands.
# shellcheck source=/dev/null
[[ $ACTION == create || ! -f $STATE/$NAME ]] || . "$STATE/$NAME"
while [[ $# -gt 0 ]]; do
  case $1 in
    --type | --zone | --project | --runtime)
      [[ $# -gt 1 ]] || die "$1: needs a value"
      field=${1#--}
      declare "${field^^}=$2"; shift ;;
    --spot) SPOT=1 ;;
    --dry-run) DRY=1 ;;
    --) shift; break ;;
    *) die "'$1': unknown; launch/tpu_vm.sh without arguments shows how" ;;
  esac
  shift
done
case ${RUNTIME:-$TYPE} in
  v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
  v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
  v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
  "$TYPE") RUNTIME=tpu-ubuntu2204-base ;;
esac

tpus() {  # gcloud compute tpus ...
  local where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
  [[ $DRY ]] || { gcloud compute tpus "$@" "${where[@]}"; return; }
  printf '%q ' gcloud compute tpus "$@" "${where[@]}"; echo
}
on() { tpus tpu-vm ssh "$NAME" --worker "$1" --command "$2"; }  # WORKER COMMAND
state() { tpus queued-resources describe "$NAME" --format 'value(state.state)'; }

create() {  # takes up a machine of this name that is there
  local now=''
  [[ $DRY ]] || now=$(state 2>/dev/null) || now=''
  if [[ $now =~ FAILED|SUSPEND ]]; then delete; now=''; fi
  [[ $now ]] || tpus queued-resources create "$NAME" --node-id "$NAME" \
    --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
  [[ $DRY ]] && { state; return; }
  mkdir -p "$STATE"
  declare -p TYPE ZONE SPOT PROJECT RUNTIME >"$STATE/$NAME"
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ ! $now =~ FAILED|SUSPEND ]] || die "$NAME: $now; delete it, try elsewhere"
    echo "$NAME: $now"
    sleep "$POLL_S"
  done
  [[ $now == ACTIVE ]] || die "$NAME: its state cannot be read"
}

setup() {
  FILES=$(mktemp -d)
  trap 'rm -rf "$FILES"' EXIT
  git archive --format tar.gz -o "$FILES/exectune.tar.gz" "${COMMIT:-HEAD}"
  (umask 077; for key in "${KEYS[@]}"; do
    [[ -z ${!key:-} ]] || printf 'export %s=%q\n' "$key" "${!key}"
  done >"$FILES/exectune.keys")
  tpus tpu-vm scp "$FILES/exectune.tar.gz" "$FILES/exectune.keys" "$NAME:" \
    --worker all --scp-flag=-p
  on all 'mkdir -p exectune && tar xzf exectune.tar.gz -C exectune &&
exectune/launch/worker.sh setup'
}

worker() { on all "exectune/launch/worker.sh$(printf ' %q' "$@")"; }
# One line for each worker; a new machine has none of our files.
states() { on all "exectune/launch/worker.sh state$(
  [[ $# == 0 ]] || printf ' %q' "$@") 2>/dev/null || echo bare"; }

run() {
  [[ " $* " == *--config* && " $* " == *--workdir* ]] ||
    die 'run NAME -- --config FILE --workdir gs://BUCKET/DIR'
  [[ -z $DRY ]] || { worker start "$@"; states "$@"; return; }
  worker start "$@" || true  # the machine may be gone: the loop finds out
  export COMMIT=${COMMIT:-$(git rev-parse HEAD)}  # of every machine of this run
  local begun=0 now seen same=(--type "$TYPE" --zone "$ZONE" --runtime
    "$RUNTIME" ${SPOT:+--spot} ${PROJECT:+--project "$PROJECT"})
  while true; do
    if seen=$(states "$@" 2>/dev/null) && [[ $seen ]]; then
      grep -qv '^done$' <<<"$seen" || { echo "$NAME: done"; return; }
      if [[ $seen == *failed* ]]; then
        sleep "$POLL_S"  # or is that how a preemption begins?
        [[ $(state 2>/dev/null) == ACTIVE ]] || continue
        echo "error: $NAME: ${seen//$'\n'/, }; the same command goes on" >&2
        worker stop || true  # the others would wait for it for ever
        on all 'tail -n 5 exectune/log' || true
        exit 1
      elif [[ $seen == *bare* || $seen == *idle* ]]; then  # new, or rebooted
        ((++begun <= RETRIES)) || die "$NAME: does not start; see its log"
        [[ $seen != *bare* ]] || launch/tpu_vm.sh setup "$NAME" "${same[@]}" ||
          echo "$NAME: not set up yet"
        worker start "$@" || echo "$NAME: not started yet"
      fi
    elif now=$(state 2>&1) || true; [[ $now =~ SUSPEND|^FAILED|NOT_FOUND ]]; then
      ((++begun <= RETRIES)) || die "$NAME: lost more than $RETRIES times"
      echo "$NAME: preempted; beginning again ($begun)"
      delete >/dev/null 2>&1 || true
      launch/tpu_vm.sh create "$NAME" "${same[@]}" || echo "$NAME: not yet"
    fi  # else gcloud cannot be reached: look again
    sleep "$POLL_S"
  done
}

status() { state; states; }
logs() { on 0 'tail -n 50 -f exectune/log'; }
stop() { worker stop; }  # it saves first
delete() { tpus queued-resources delete "$NAME" --force --quiet; }

"$ACTION" "$@"
