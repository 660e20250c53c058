#!/usr/bin/env bash
# Trains with several processes on this machine.
#
# start -> wait -> stop. Process 0 shows its output here; the output of each
# goes to LOG_DIR/process-I.log. If one process fails, the others are stopped.
# Example, two processes with four fake CPU devices each:
#   launch/local.sh --processes=2 --devices=4 -- \
#     --config=configs/shapes.py:quick --workdir=runs/two
set -euo pipefail
# shellcheck source=launch/lib/common.sh
. "$(dirname "$0")/lib/common.sh"

number processes required "Number of processes."
number devices 0 "Fake CPU devices of each process; 0: the real devices."
number port 0 "Port of process 0 on 127.0.0.1; 0: a free one."
flag python python "Python with narvl_jax installed."
common_flags launch_logs/local
parse_flags "$@"
at_least_one processes
need "${FLAG[python]}" "install Python 3.11 or newer, or name it: --python=PATH"

# A process without its peer hangs in a collective and cannot save.
PEER_GRACE_SECONDS=10
PIDS=()
TEE=

attempt() {
  local port=${FLAG[port]} process
  if ((port == 0)); then port=$(free_port); fi
  stage "start ${FLAG[processes]} processes, attempt $ATTEMPT"
  make_secret
  is_on dry_run && quote mkdir -p "${FLAG[log_dir]}"
  PIDS=()
  TRAINING=yes
  for ((process = 0; process < ${FLAG[processes]}; process++)); do
    start "$process" "$port"
  done
  if is_on dry_run; then
    echo wait
  else
    wait_for_all
  fi
}

free_port() {
  "${FLAG[python]}" -c '
import socket
with socket.socket() as s:
  s.bind(("127.0.0.1", 0))
  print(s.getsockname()[1])'
}

start() {  # PROCESS PORT
  local log=${FLAG[log_dir]}/process-$1.log
  local -a command=(
    "${FLAG[python]}" -m narvl_jax.train "${TRAIN_ARGS[@]}"
    --distributed=on "--coordinator_address=127.0.0.1:$2"
    "--num_processes=${FLAG[processes]}" "--process_id=$1"
  )
  if ((${FLAG[devices]} > 0)); then
    command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$(xla_flags)" "${command[@]}")
  fi
  if is_on dry_run; then
    echo "$(quote "${command[@]}") >> $(quote "$log") 2>&1 &"
  elif (($1 == 0)); then
    exec {output}> >(exec tee -a "$log")
    TEE=$!
    "${command[@]}" >&"$output" 2>&1 </dev/null {output}>&- &
    PIDS[0]=$!
    exec {output}>&-
  else
    "${command[@]}" >>"$log" 2>&1 </dev/null &
    PIDS[$1]=$!
  fi
}

xla_flags() {  # XLA_FLAGS with the number of devices of --devices
  local word words=
  for word in ${XLA_FLAGS-}; do
    if [[ $word != --xla_force_host_platform_device_count=* ]]; then
      words+="$word "
    fi
  done
  echo "$words--xla_force_host_platform_device_count=${FLAG[devices]}"
}

wait_for_all() {
  local code=0 process left=("${!PIDS[@]}")
  while ((${#left[@]})); do
    for process in "${left[@]}"; do
      if kill -0 "${PIDS[process]}" 2>/dev/null; then continue; fi
      wait "${PIDS[process]}" || code=$?
      unset "PIDS[process]"
      if ((code)); then
        stop_processes "$PEER_GRACE_SECONDS"
        report "$process" "$code"
        return "$code"
      fi
    done
    left=("${!PIDS[@]}")
    pause 0.2
  done
  wait "$TEE" || true
  TRAINING=
}

report() {  # PROCESS CODE
  local log=${FLAG[log_dir]}/process-$1.log
  say "process $1 ended with exit code $2; the last lines of $log:"
  tail -n 20 "$log" | sed 's/^/  | /'
}

stop_processes() {  # GRACE_SECONDS: TERM, wait, KILL
  local pid
  for pid in "${PIDS[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  if ! ends_within "$1" "${PIDS[@]}"; then
    say "still running after $1 s: KILL"
  fi
  # The process groups contain remaining workers.
  for pid in "${PIDS[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  for pid in "${PIDS[@]}"; do wait "$pid" 2>/dev/null || true; done
  PIDS=()
  wait "$TEE" 2>/dev/null || true
  TRAINING=
}

stop_training() { stop_processes "${FLAG[grace_seconds]}"; }

launch with_retries attempt
