#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod.
#
# create -> copy -> install -> set up -> train -> logs [-> delete]. An existing pod is
# reused, a preempted one is created again. LOG_DIR/attempt-N/ gets the output of
# the attempt (stream.log) and the log of each host.
# Example:
#   launch/tpu_vm.sh --name=narvl --zone=us-west4-a --project=my-project \
#     --accelerator_type=v5litepod-16 --version=v2-alpha-tpuv5-lite -- \
#     --config=configs/shapes.py --workdir=gs://my-bucket/runs/shapes
set -euo pipefail
# shellcheck source=launch/lib/common.sh
. "$(dirname "$0")/lib/common.sh"
# shellcheck source=launch/lib/tpu.sh
. launch/lib/tpu.sh

flag name required "Name of the TPU VM."
flag zone required "Zone, such as us-west4-a."
flag project required "Google Cloud project."
flag accelerator_type required "Type and size, such as v5litepod-16."
flag version required "Runtime version, such as v2-alpha-tpuv5-lite."
switch spot "Cheaper; may be preempted at any time."
flag extras gcs "Extras of narvl_jax to install: gcs, s3, wandb, trackio."
flag setup_command "" "Runs on every host before training: mount a folder."
switch delete "Delete the TPU VM at the end, also after a failure or a stop."
common_flags launch_logs/tpu_vm
parse_flags "$@"
need gcloud "$NEED_GCLOUD"

GCLOUD=(gcloud compute tpus tpu-vm)
NAME=${FLAG[name]}
PLACE=("--zone=${FLAG[zone]}" "--project=${FLAG[project]}")
ALL=(--worker=all)
NODES=("$NAME")

create_pod() {
  local state=
  stage "create $NAME, unless it is READY already"
  if is_on dry_run; then
    run "${GCLOUD[@]}" describe "$NAME" "${PLACE[@]}" --format='value(state)'
  else
    state=$(query "${GCLOUD[@]}" describe "$NAME" "${PLACE[@]}" \
      --format='value(state)') || state=
  fi
  case $state in
    "") new_pod ;;
    READY) ;;
    PREEMPTED | STOPPED | TERMINATED)
      say "$NAME is $state; it is deleted and created again"
      delete_pod && new_pod ;;
    *) say "$NAME is $state, not READY" && return 1 ;;
  esac
}

new_pod() {
  local -a spot=()
  if is_on spot; then spot=(--spot); fi
  run "${GCLOUD[@]}" create "$NAME" "${PLACE[@]}" \
    "--accelerator-type=${FLAG[accelerator_type]}" \
    "--version=${FLAG[version]}" "${spot[@]}" --quiet
}

delete_pod() {
  stage "delete $NAME"
  run "${GCLOUD[@]}" delete "$NAME" "${PLACE[@]}" --quiet
}

launch with_retries tpu_attempt
