# shellcheck shell=bash
# The stages that TPU VMs and queued resources share: code, packages, training
# and logs over `gcloud ... ssh` and `gcloud ... scp` on all hosts at once.
#
# The script that sources this sets GCLOUD (the command with its group), NAME,
# PLACE (zone and project), ALL (the flags that mean every host), NODES (the
# TPU VMs) and defines `create_pod` and `delete_pod`.

NEED_GCLOUD="install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
REMOTE=narvl_jax/launch/lib/remote.sh
ENVIRONMENT=launch_environment  # The variables of `PASSED_ON`, for remote.sh.
LOGS_DUE=  # Not empty from the start of training until its logs are here.

tpu_attempt() {
  local code=0
  create_pod && stop_leftovers && copy_code && install && set_up || return
  train || code=$?
  fetch_logs
  return "$code"
}

finish() {
  if [[ -n $LOGS_DUE ]]; then fetch_logs; fi
  if is_on delete; then
    delete_pod || say "could not delete $NAME; it costs money until it is deleted"
  fi
}

on_all_hosts() {  # COMMAND_LINE [WHAT_FOLLOWS]
  local ssh
  ssh=$(quote "${GCLOUD[@]}" ssh "$NAME" "${PLACE[@]}" "${ALL[@]}" --quiet \
    --command="$1")
  run_line "$ssh${2-}"
}

stop_leftovers() {
  stage "stop the training of an earlier launch, with a save"
  on_all_hosts "test ! -e $REMOTE || bash $REMOTE reset ${FLAG[grace_seconds]}"
}

copy_code() {
  local archive=${FLAG[log_dir]}/narvl_jax.tar.gz
  stage "copy the code to all hosts"
  run mkdir -p "${FLAG[log_dir]}"
  make_secret
  note_credentials
  # Both files contain secrets, and the command line only their names.
  run_line "(umask 077 && for name in $(passed_on); do\
 printf 'export %s=%q\\n' \"\$name\" \"\${!name}\"; done\
 >$(quote "${FLAG[log_dir]}/$ENVIRONMENT") && : >$(quote "$archive"))" ||
    return 1
  run tar --exclude=./.git --exclude=./runs --exclude=./launch_logs \
    --exclude="./${FLAG[log_dir]}" --exclude='./.venv*' \
    --exclude=__pycache__ --exclude='*.egg-info' --exclude='./.*_cache' \
    -czf "$archive" . -C "${FLAG[log_dir]}" "$ENVIRONMENT" || return 1
  run "${GCLOUD[@]}" scp "$archive" "$NAME:narvl_jax.tar.gz" \
    "${PLACE[@]}" "${ALL[@]}" --quiet &&
    on_all_hosts "rm -rf narvl_jax/narvl_jax && mkdir -p narvl_jax &&\
 tar -xzf narvl_jax.tar.gz -C narvl_jax"
}

install() {
  stage "install narvl_jax and jax for TPU on all hosts"
  on_all_hosts "bash $REMOTE install $(quote "${FLAG[extras]}")"
}

set_up() {
  if [[ -z ${FLAG[setup_command]} ]]; then return; fi
  stage "set up all hosts"
  on_all_hosts "${FLAG[setup_command]}"
}

train() {
  local code=0 folder=${FLAG[log_dir]}/attempt-$ATTEMPT
  stage "train on all hosts, attempt $ATTEMPT"
  if [[ ! " ${TRAIN_ARGS[*]} " =~ --workdir[=\ ](/|gs:|s3:) ]]; then
    stage "note: --workdir is relative, so each host has its own; a pod of" \
      "several hosts needs a folder that all of them share: gs://BUCKET/RUN"
  fi
  run mkdir -p "$folder"
  TRAINING=yes LOGS_DUE=yes
  on_all_hosts "bash $REMOTE run $(quote "${TRAIN_ARGS[@]}")" \
    " 2>&1 | tee $(quote "$folder/stream.log")" || code=$?
  TRAINING=
  # gcloud reports the exit code of the first host that failed; a mistake of the
  # user on any host takes precedence.
  if ! is_on dry_run &&
    grep -q 'training ended with exit code 2$' "$folder/stream.log"; then
    code=2
  fi
  return "$code"
}

stop_training() {
  local stream=$CHILD
  on_all_hosts "bash $REMOTE stop ${FLAG[grace_seconds]}" || true
  # The stream ends after its last lines.
  ends_within 30 "$stream" || true
  CHILD=$stream TRAINING=
}

fetch_logs() {
  local node count copy folder=${FLAG[log_dir]}/attempt-$ATTEMPT
  LOGS_DUE=
  stage "fetch the log of each host"
  for node in "${NODES[@]}"; do
    count=$(quote gcloud compute tpus tpu-vm describe "$node" "${PLACE[@]}" \
      --format='value(networkEndpoints.len())')
    copy=$(quote gcloud compute tpus tpu-vm scp "${PLACE[@]}" --quiet \
      "$node:narvl_jax_state/train.log")
    run_line "for worker in \$(seq 0 \$((\$($count) - 1))); do\
 $copy $(quote "$folder/$node")-worker-\$worker.log --worker=\$worker; done" ||
      say "could not fetch every log of $node"
  done
}
