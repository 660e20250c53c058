#!/usr/bin/env bash
# Runs on every host of a TPU pod; the launch scripts call it over ssh.
#
#   remote.sh install EXTRAS   a virtual environment with narvl_jax and libtpu
#   remote.sh run ARGUMENTS    trains; shows the output, ends with its exit code
#   remote.sh stop SECONDS     TERM, wait for the save, KILL
#   remote.sh reset SECONDS    stop, then remove the state of the attempt
#
# While an attempt exists, `run` does not start another one but shows its output.
# So a lost connection does no harm, and gcloud may repeat the command.
set -euo pipefail

state=$HOME/narvl_jax_state
attempt=$state/attempt  # supervisor, pid, stopped, exit_code
cd "$(dirname "$0")/../.."
remote=launch/lib/remote.sh

install() {  # EXTRAS of setup.py, such as gcs,wandb
  # Images of TPU VMs may have Python 3.10; uv finds a newer one or fetches it.
  # Its exit code 2 often means a network failure, not a mistake of the user.
  python3 -m pip install --quiet --user uv &&
    python3 -m uv venv --quiet --allow-existing --python '>=3.11' .venv &&
    python3 -m uv pip install --quiet --python .venv/bin/python \
      -e ".[tpu${1:+,$1}]" || exit 1
}

run() {  # ARGUMENTS of narvl_jax.train
  local code=1  # The machine was started again, or the supervisor was killed.
  mkdir -p "$state"
  if mkdir "$attempt" 2>/dev/null; then
    : >"$state/train.log"
    # A session of its own survives the end of the connection.
    setsid nohup bash "$remote" supervise "$@" >/dev/null 2>&1 </dev/null &
    until [[ -e $attempt/pid ]]; do sleep 0.1; done
  fi
  show | sed -u "s/^/[$(hostname)] /"
  if [[ -e $attempt/exit_code ]]; then code=$(<"$attempt/exit_code"); fi
  echo "[$(hostname)] training ended with exit code $code"
  exit "$code"
}

show() {  # What training prints, until it ends.
  if [[ -e $attempt/exit_code ]]; then
    cat "$state/train.log"
  else
    tail -n +1 -f -s 0.5 --pid="$(<"$attempt/supervisor")" "$state/train.log"
  fi
}

supervise() {  # ARGUMENTS of narvl_jax.train
  local code=0
  # In a file, since command lines are visible to others.
  if [[ -e launch_environment ]]; then
    # shellcheck source=/dev/null
    . ./launch_environment
  fi
  # The end of a preempted host is no success: the launcher starts it again.
  export NARVL_STOPPED_CODE=75
  echo $$ >"$attempt/supervisor"
  .venv/bin/python -m narvl_jax.train "$@" >>"$state/train.log" 2>&1 &
  echo $! >"$attempt/pid.new"
  mv "$attempt/pid.new" "$attempt/pid"
  wait $! || code=$?
  if [[ $code == 75 && -e $attempt/stopped ]]; then code=0; fi
  echo "$code" >"$attempt/exit_code"
}

stop() {  # SECONDS
  local pid deadline=$((SECONDS + $1))
  [[ -e $attempt/pid && ! -e $attempt/exit_code ]] || return 0
  pid=$(<"$attempt/pid")
  touch "$attempt/stopped"
  kill -TERM "$pid" 2>/dev/null || return 0
  while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do
    sleep 0.2
  done
  if kill -KILL "$pid" 2>/dev/null; then
    echo "[$(hostname)] still running after $1 s: KILL"
  fi
  until [[ -e $attempt/exit_code ]] || ((SECONDS >= deadline + 5)); do
    sleep 0.1
  done
  # Remaining worker processes.
  kill -KILL -- "-$(<"$attempt/supervisor")" 2>/dev/null || true
}

reset() {  # SECONDS
  stop "$1"
  rm -rf "$attempt"
}

case ${1-} in
  install | run | stop | reset | supervise) "$@" ;;
  *) echo "error: remote.sh install, run, stop or reset" >&2 && exit 2 ;;
esac
