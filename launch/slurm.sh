#!/usr/bin/env bash
# Trains on a SLURM cluster; jax detects the processes of the job.
#
# --mode=sbatch queues a job and returns; the job calls this script again with
# --mode=srun: start -> wait -> stop. Use --mode=srun yourself inside an
# allocation (salloc). LOG_DIR/task-I.log gets the output of each process.
# Example:
#   launch/slurm.sh --nodes=4 --processes_per_node=8 --gpus_per_node=8 \
#     --time=24:00:00 --requeue -- \
#     --config=configs/shapes.py --workdir=gs://my-bucket/runs/shapes
set -euo pipefail
# shellcheck source=launch/lib/common.sh
. "$(dirname "$0")/lib/common.sh"

flag mode sbatch "sbatch: queue a job; srun: run now, in an allocation."
flag job_name narvl_jax "Jobs of the same name run one after the other."
number nodes required "Number of nodes."
number processes_per_node 1 "Processes on each node; one per GPU is usual."
number gpus_per_node 0 "GPUs of each node; 0: request none."
flag time "" "Time limit, such as 24:00:00."
flag partition "" "Partition."
flag account "" "Account."
switch requeue "At the time limit, save and queue the job again."
flag python python "Python with narvl_jax installed, on all nodes."
common_flags launch_logs/slurm
parse_flags "$@"
at_least_one nodes processes_per_node
case ${FLAG[mode]} in
  sbatch) PROGRAM=sbatch ;;
  srun) PROGRAM=srun ;;
  *) die "--mode=\"${FLAG[mode]}\": neither sbatch nor srun; use" \
    "--mode=sbatch" ;;
esac
need "$PROGRAM" "SLURM's programs are on the login nodes of a cluster: log in \
to one, or load its module (module load slurm)"

SIZE=("--nodes=${FLAG[nodes]}"
  "--ntasks-per-node=${FLAG[processes_per_node]}")
if ((${FLAG[gpus_per_node]} > 0)); then
  SIZE+=("--gpus-per-node=${FLAG[gpus_per_node]}")
fi

# ---- Queue a job ----

submit() {
  local name job
  # USR1 announces the time limit; TERM comes from the user.
  local -a options=(
    "--job-name=${FLAG[job_name]}" "${SIZE[@]}" --dependency=singleton
    "--signal=B:USR1@$((${FLAG[grace_seconds]} + 60))"
    "--output=${FLAG[log_dir]}/job-%j.log" --open-mode=append
  )
  for name in time partition account; do
    if [[ -n ${FLAG[$name]} ]]; then options+=("--$name=${FLAG[$name]}"); fi
  done
  if is_on requeue; then options+=(--requeue); fi
  stage "queue a job that runs this script again"
  run mkdir -p "${FLAG[log_dir]}"
  run_line "$(quote sbatch --parsable "${options[@]}" \
    "--wrap=exec bash $(job_command)") | tee $(quote "${FLAG[log_dir]}/job_id")" ||
    return
  if is_on dry_run; then return; fi
  job=$(cut -d ';' -f 1 "${FLAG[log_dir]}/job_id")
  say "job $job; output: ${FLAG[log_dir]}/job-$job.log"
  say "stop with a save: scancel --batch --signal=TERM $job"
}

job_command() {
  local name
  local -a flags=(--mode=srun)
  for name in nodes processes_per_node gpus_per_node requeue python log_dir \
    retries backoff_seconds grace_seconds; do
    flags+=("--$name=${FLAG[$name]}")
  done
  quote "$SCRIPT" "${flags[@]}" -- "${TRAIN_ARGS[@]}"
}

# ---- Inside the job ----

attempt() {
  local code=0 first
  stage "start ${FLAG[nodes]} x ${FLAG[processes_per_node]} processes," \
    "attempt $ATTEMPT"
  make_secret # srun passes the environment on.
  run mkdir -p "${FLAG[log_dir]}"
  TRAINING=yes
  run_srun || code=$?
  TRAINING=
  if is_on dry_run; then return; fi
  cat "$(srun_log)" >&2
  # srun ends with the highest code, but SLURM ends the peers of a process that
  # failed, and their codes are higher. The first one is the cause.
  first=$(grep -o 'Exited with exit code [0-9]*' "$(srun_log)" | head -n 1) ||
    true
  if [[ -n $first ]]; then code=${first##* }; fi
  return "$code"
}

srun_log() { echo "${FLAG[log_dir]}/srun-$ATTEMPT.log"; }

run_srun() {
  local -a command=(
    # The end of one process must not interrupt the save of the others.
    srun "${SIZE[@]}" --kill-on-bad-exit=0
    "--wait=$((${FLAG[grace_seconds]} + 1))" --unbuffered
    "--output=${FLAG[log_dir]}/task-%t.log" --open-mode=append
    "${FLAG[python]}" -m narvl_jax.train "${TRAIN_ARGS[@]}"
  )
  if is_on dry_run; then
    echo "$(quote "${command[@]}") 2> $(quote "$(srun_log)")"
  else
    say "output of process 0: ${FLAG[log_dir]}/task-0.log"
    wait_for exec_srun "${command[@]}"
  fi
}

# srun replaces this process, so that it receives the signals itself.
exec_srun() { exec "$@" 2>"$(srun_log)"; }

stop_training() {
  local srun=$CHILD
  # srun forwards the signal to all its processes.
  kill -TERM "$srun" 2>/dev/null || true
  if ! ends_within "${FLAG[grace_seconds]}" "$srun"; then
    say "still running after ${FLAG[grace_seconds]} s: KILL"
    # Twice within a second makes srun end its processes with KILL.
    kill -INT "$srun" && sleep 0.3 && kill -INT "$srun" || true
    ends_within 60 "$srun" || kill -KILL "$srun" || true
  fi
  CHILD='' TRAINING=
}

at_time_limit() {
  trap '' USR1
  finish() {
    if is_on requeue; then
      say "queued again"
      run scontrol requeue "$SLURM_JOB_ID" || say "could not queue it again"
    fi
  }
  on_signal USR1 15
}

if [[ $PROGRAM == sbatch ]]; then
  launch with_retries submit
else
  trap at_time_limit USR1
  launch with_retries attempt
fi
