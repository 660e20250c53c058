#!/usr/bin/env bash
# Trains on Cloud TPUs of a queued resource, one slice or several.
#
# create -> wait -> copy -> install -> set up -> train -> logs [-> delete]. An
# existing request is reused; a failed or suspended one is requested again.
# LOG_DIR/attempt-N/ gets the output of the attempt (stream.log) and the log of
# each host. Example, two slices:
#   launch/queued_resource.sh --name=narvl --zone=us-west4-a \
#     --project=my-project --accelerator_type=v5litepod-256 \
#     --version=v2-alpha-tpuv5-lite --num_slices=2 -- \
#     --config=configs/shapes.py --workdir=gs://my-bucket/runs/shapes
set -euo pipefail
# shellcheck source=launch/lib/common.sh
. "$(dirname "$0")/lib/common.sh"
# shellcheck source=launch/lib/tpu.sh
. launch/lib/tpu.sh

flag name required "Name of the queued resource and of its TPU VMs."
flag zone required "Zone, such as us-west4-a."
flag project required "Google Cloud project."
flag accelerator_type required "Type and size of a slice: v5litepod-256."
flag version required "Runtime version, such as v2-alpha-tpuv5-lite."
number num_slices 1 "Number of slices of that type."
switch spot "Cheaper; may be preempted at any time."
number wait_seconds 86400 "Seconds to wait for the TPUs."
number poll_seconds 30 "Seconds between checks while waiting."
flag extras gcs "Extras of narvl_jax to install: gcs, s3, wandb, trackio."
flag setup_command "" "Runs on every host before training: mount a folder."
switch delete "Delete the TPUs at the end, also after a failure or a stop."
common_flags launch_logs/queued_resource
parse_flags "$@"
at_least_one num_slices poll_seconds
need gcloud "$NEED_GCLOUD"

GCLOUD=(gcloud compute tpus queued-resources)
NAME=${FLAG[name]}
PLACE=("--zone=${FLAG[zone]}" "--project=${FLAG[project]}")
# Without --batch-size only 64 hosts would start and wait for the others.
ALL=(--node=all --worker=all --batch-size=all)
NODES=("$NAME")
if ((${FLAG[num_slices]} > 1)); then
  NODES=()
  for ((slice = 0; slice < ${FLAG[num_slices]}; slice++)); do
    NODES+=("$NAME-$slice")
  done
fi

DESCRIBE=("${GCLOUD[@]}" describe "$NAME" "${PLACE[@]}"
  '--format=value(state.state)')
DELETE=("${GCLOUD[@]}" delete "$NAME" "${PLACE[@]}" --force --quiet)

create_pod() {
  local state deadline=$((SECONDS + ${FLAG[wait_seconds]}))
  stage "request $NAME unless it exists; wait until it is ACTIVE"
  if is_on dry_run; then
    run "${DESCRIBE[@]}" && new_pod && run "${DESCRIBE[@]}"
    return
  fi
  while :; do
    state=$(query "${DESCRIBE[@]}") || state=
    case $state in
      ACTIVE) return ;;
      "") new_pod || return ;;
      FAILED | SUSPENDED)
        say "$NAME is $state; it is deleted, the next attempt requests it again"
        delete_pod && return 1 || return ;;
      *) say "$NAME is $state" ;;
    esac
    if ((SECONDS >= deadline)); then
      say "not ACTIVE after --wait_seconds=${FLAG[wait_seconds]}; it stays in" \
        "the queue: the same command continues to wait; to give it up:" \
        "$(quote "${DELETE[@]}")"
      return 124
    fi
    pause "${FLAG[poll_seconds]}"
  done
}

new_pod() {
  local -a nodes=("--node-id=$NAME") spot=()
  if ((${FLAG[num_slices]} > 1)); then
    nodes=("--node-count=${FLAG[num_slices]}" "--node-prefix=$NAME")
  fi
  if is_on spot; then spot=(--spot); fi
  run "${GCLOUD[@]}" create "$NAME" "${PLACE[@]}" "${nodes[@]}" \
    "--accelerator-type=${FLAG[accelerator_type]}" \
    "--runtime-version=${FLAG[version]}" "${spot[@]}" --quiet
}

delete_pod() {
  stage "delete $NAME and its TPU VMs"
  run "${DELETE[@]}"
}

launch with_retries tpu_attempt
