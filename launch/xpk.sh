#!/usr/bin/env bash
# Trains on a GKE cluster with TPUs, as an xpk workload.
#
# create -> wait -> logs. A workload that runs is followed again, one that
# ended is replaced. The cluster retries. LOG_DIR/POD.log gets
# the output of each pod. Example:
#   launch/xpk.sh --cluster=my-cluster --workload=narvl --zone=us-west4-a \
#     --project=my-project --tpu_type=v5litepod-256 --num_slices=2 \
#     --docker_image=gcr.io/my-project/narvl_jax:latest -- \
#     --config=configs/shapes.py --workdir=gs://my-bucket/runs/shapes
set -euo pipefail
# shellcheck source=launch/lib/common.sh
. "$(dirname "$0")/lib/common.sh"

flag cluster required "Name of the GKE cluster."
flag workload required "Name of the workload."
flag zone required "Zone, such as us-west4-a."
flag project required "Google Cloud project."
flag tpu_type required "Type and size of a slice, such as v5litepod-256."
number num_slices 1 "Number of slices of that type."
flag docker_image "" "Image that has narvl_jax and jax for TPU."
flag base_docker_image "" "Or: image with Python, to which xpk adds the code."
flag extras gcs "Extras of narvl_jax for --base_docker_image."
number wait_seconds 86400 "Seconds to wait until the pods run."
number poll_seconds 10 "Seconds between checks while waiting."
common_flags launch_logs/xpk
parse_flags "$@"
at_least_one num_slices poll_seconds
if [[ -n ${FLAG[docker_image]} && -n ${FLAG[base_docker_image]} ]]; then
  die "--docker_image and --base_docker_image exclude each other"
elif [[ -z ${FLAG[docker_image]}${FLAG[base_docker_image]} ]]; then
  die "flag --docker_image (or --base_docker_image) is required:" \
    "${FLAG_HELP[docker_image]}"
fi
need xpk "install it: pip install xpk"
need kubectl "install it: gcloud components install kubectl"

WORKLOAD=${FLAG[workload]}
PLACE=("--cluster=${FLAG[cluster]}" "--project=${FLAG[project]}"
  "--zone=${FLAG[zone]}")
PODS=(kubectl get pods "--selector=xpk.google.com/workload=$WORKLOAD")
JOBSET=(kubectl get jobset "$WORKLOAD" --ignore-not-found
  '--output=jsonpath={.metadata.name} {.status.terminalState}')
DELETE=(xpk workload delete "${PLACE[@]}" "--workload=$WORKLOAD")

attempt() {
  with_retries create_workload && follow_workload
}

create_workload() {
  local state=
  stage "create $WORKLOAD unless it exists; xpk list also points" \
    "kubectl to the cluster"
  run xpk workload list "${PLACE[@]}" "--filter-by-job=$WORKLOAD" || return
  if is_on dry_run; then
    run "${JOBSET[@]}"
  else
    state=$(query "${JOBSET[@]}") || return
  fi
  case $state in
    "") new_workload ;;
    *Completed | *Failed)
      say "an earlier $state; it is replaced"
      delete_workload && new_workload ;;
    *) say "$WORKLOAD exists already" ;;
  esac
}

new_workload() {
  local -a image=("--docker-image=${FLAG[docker_image]}")
  # xpk sends TERM to the shell that runs the command; exec makes that Python.
  local command
  command="exec python -m narvl_jax.train $(quote "${TRAIN_ARGS[@]}")"
  if [[ -n ${FLAG[base_docker_image]} ]]; then
    image=("--base-docker-image=${FLAG[base_docker_image]}" --script-dir=.)
    command="python -m pip install --quiet -e\
 $(quoted ".[tpu,${FLAG[extras]}]") && $command"
  fi
  make_secret
  note_credentials
  run mkdir -p "${FLAG[log_dir]}"
  # Without values: xpk reads them from its own environment.
  run_line "printf '%s\\n' $(passed_on) NARVL_STOPPED_CODE=75\
 >$(quote "${FLAG[log_dir]}/environment")"
  # xpk retries after 42 and 127 to 255; failed training ends with 1, a run that
  # is stuck or preempted with 75.
  run xpk workload create "${PLACE[@]}" "--workload=$WORKLOAD" \
    "--tpu-type=${FLAG[tpu_type]}" "--num-slices=${FLAG[num_slices]}" \
    "${image[@]}" "--max-restarts=${FLAG[retries]}" \
    --restart-on-exit-codes=1,75 "--env-file=${FLAG[log_dir]}/environment" \
    "--termination-grace-period-seconds=${FLAG[grace_seconds]}" \
    "--command=$command"
}

follow_workload() {
  local state
  TRAINING=yes
  while :; do
    wait_for_pods || return
    follow_logs || say "the stream of logs broke"
    if is_on dry_run; then
      run "${JOBSET[@]}"
      return
    fi
    state=$(query "${JOBSET[@]}") || state=unknown
    case $state in
      *Completed) return 0 ;;
      *Failed) return "$(exit_code)" ;;
      "") say "$WORKLOAD no longer exists" && return 1 ;;
    esac
    say "the pods still run; following again"
    pause "${FLAG[poll_seconds]}"
  done
}

wait_for_pods() {
  local phases deadline=$((SECONDS + ${FLAG[wait_seconds]}))
  local -a phase=("${PODS[@]}" '--output=jsonpath={.items[*].status.phase}')
  stage "wait until the pods run"
  if is_on dry_run; then
    run "${phase[@]}"
    return
  fi
  while :; do
    phases=$(query "${phase[@]}") || phases=
    if [[ -n $phases && $phases != *Pending* ]]; then return; fi
    if ((SECONDS >= deadline)); then
      say "no pods run after --wait_seconds=${FLAG[wait_seconds]}; the same" \
        "command continues to wait; to give it up: $(quote "${DELETE[@]}")"
      return 124
    fi
    pause "${FLAG[poll_seconds]}"
  done
}

follow_logs() {
  stage "logs of all pods, one file for each"
  run mkdir -p "${FLAG[log_dir]}"
  # A line is "[pod/NAME/CONTAINER] TEXT".
  run_line "$(quote kubectl logs --follow --prefix --all-containers --tail=-1 \
    --max-log-requests=4096 "--selector=xpk.google.com/workload=$WORKLOAD") |\
 tee /dev/stderr | awk -v folder=$(quote "${FLAG[log_dir]}") '\
{ split(\$1, part, \"/\"); file = folder \"/\" part[2] \".log\";\
 sub(/^[^ ]* /, \"\"); print > file; fflush(file) }'"
}

exit_code() {  # 2 if any pod ended with it, otherwise the first other than 0
  local code codes
  codes=$(query "${PODS[@]}" '--output=jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}') || codes=
  if [[ " $codes " == *" 2 "* ]]; then echo 2 && return; fi
  for code in $codes; do
    if ((code)); then echo "$code" && return; fi
  done
  echo 1
}

delete_workload() { run "${DELETE[@]}"; }

stop_training() {
  local stream=$CHILD
  delete_workload || true
  # Kubernetes waits for the save, then sends KILL; then the logs end.
  ends_within "$((${FLAG[grace_seconds]} + 30))" "$stream" || true
  CHILD=$stream TRAINING=
}

launch attempt
