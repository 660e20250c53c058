# shellcheck shell=bash
# Functions of the launch scripts: flags, dry run, retries, stopping.
#
# A script sources this file, defines its flags with `flag`, `number` and
# `switch`, calls `parse_flags "$@"` and then runs its stages. It may redefine
# the hooks `stop_training` and `finish`.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION;" \
    "install it and call: bash launch/NAME.sh" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
# Each background command gets a process group of its own. So Ctrl-C reaches
# only the script, which then stops processes in the right order.
set -m

SCRIPT=launch/$(basename "$0")
declare -A FLAG=() FLAG_HELP=() FLAG_KIND=()
FLAG_NAMES=()
TRAIN_ARGS=()
ATTEMPT=1
MOST_DELAY=600  # Seconds; a preempted run may need many attempts.
CHILD=     # The command that runs now; also the id of its process group.
TRAINING=  # Not empty while training may be alive.

# ---- Flags ----

flag() {  # NAME DEFAULT HELP; the default "required" has to be given
  FLAG_NAMES+=("$1") FLAG[$1]=$2 FLAG_HELP[$1]=$3 FLAG_KIND[$1]=${4:-text}
}

number() { flag "$1" "$2" "$3" number; }

switch() { flag "$1" false "$2" switch; }

common_flags() {  # DEFAULT_LOG_DIR
  flag log_dir "$1/$(date +%Y%m%d-%H%M%S)" "Folder for the logs of all hosts."
  number retries 3 "Number of retries of a failed attempt."
  number backoff_seconds 10 "Wait before the first retry; doubles, up to 600."
  number grace_seconds 300 "On stop: seconds from TERM to KILL, for the save."
  switch dry_run "Print the commands, run nothing."
  switch help "Print this text."
}

parse_flags() {  # ARGUMENTS OF THE SCRIPT
  local name
  while (($#)); do
    case $1 in
      --) shift && TRAIN_ARGS=("$@") && break ;;
      --*) set_flag "${1#--}" ;;
      *) die "unexpected argument \"$1\"; flags start with \"--\"," \
        "arguments of narvl_jax.train follow after \"--\"" ;;
    esac
    shift
  done
  if is_on help; then usage && exit 0; fi
  for name in "${FLAG_NAMES[@]}"; do
    if [[ ${FLAG[$name]} == required ]]; then
      die "flag --$name is required: ${FLAG_HELP[$name]}"
    fi
  done
  for name in config workdir; do
    if [[ ! " ${TRAIN_ARGS[*]-} " =~ \ --${name}[=\ ] ]]; then
      die "no --$name=... among the arguments of narvl_jax.train;" \
        "they follow after \"--\": $SCRIPT [flags] -- --config=FILE.py" \
        "--workdir=DIR"
    fi
  done
}

set_flag() {  # NAME=VALUE, or the NAME of a switch
  local name=${1%%=*} value
  if [[ -z ${FLAG_KIND[$name]-} ]]; then
    case $name in
      config | config.* | workdir)
        die "unknown flag \"--$name\"; arguments of narvl_jax.train follow" \
          "after \"--\": $SCRIPT [flags] -- --$1" ;;
      *) die "unknown flag \"--$name\".$(did_you_mean "$name")" ;;
    esac
  fi
  case $1 in
    *=*) value=${1#*=} ;;
    *) [[ ${FLAG_KIND[$name]} == switch ]] ||
      die "flag --$name needs a value: --$name=VALUE"
      value=true ;;
  esac
  case ${FLAG_KIND[$name]} in
    number) [[ $value =~ ^[0-9]{1,9}$ ]] ||
      die "--$name=\"$value\": not a whole number; nearest valid:" \
        "--$name=$(nearest_number "$value" "$name")"
      value=$((10#$value)) ;;
    switch) [[ $value == true || $value == false ]] ||
      die "--$name=\"$value\": neither true nor false; use --$name" ;;
  esac
  FLAG[$name]=$value
}

at_least_one() {  # NAMES OF NUMBERS
  local name
  for name; do
    ((${FLAG[$name]} >= 1)) ||
      die "--$name=\"${FLAG[$name]}\": too small; nearest valid: --$name=1"
  done
}

nearest_number() {  # VALUE FLAG
  if [[ $1 =~ ^-?[0-9]+ ]]; then
    [[ $1 == -* ]] && echo 0 || echo "${BASH_REMATCH[0]:0:9}"
  else
    [[ ${FLAG[$2]} =~ ^[0-9]+$ ]] && echo "${FLAG[$2]}" || echo 1
  fi
}

did_you_mean() {  # NAME: prints the flag with the smallest edit distance
  printf '%s\n' "${FLAG_NAMES[@]}" | awk -v a="$1" '
    function min(x, y) { return x < y ? x : y }
    { n = length(a); m = length($0)
      for (j = 0; j <= m; j++) d[0, j] = j
      for (i = 1; i <= n; i++) { d[i, 0] = i
        for (j = 1; j <= m; j++)
          d[i, j] = min(min(d[i-1, j], d[i, j-1]) + 1, d[i-1, j-1] + \
            (substr(a, i, 1) != substr($0, j, 1))) }
      if (NR == 1 || d[n, m] < best) { best = d[n, m]; name = $0 } }
    END { printf " Did you mean \"--%s\"? All flags: --help", name }'
}

usage() {
  local name default
  printf 'usage: %s [flags] -- --config=FILE.py --workdir=DIR [...]\n\n' \
    "$SCRIPT"
  # The comment at the head of the script.
  sed -n '1d;/^#/!q;s/^# \{0,1\}//p' "$SCRIPT"
  printf '\nPaths are relative to the root of the repository.\n\nflags:\n'
  for name in "${FLAG_NAMES[@]}"; do
    default=${FLAG[$name]}
    case ${FLAG_KIND[$name]}:$name:$default in
      switch:*) printf '  --%s\n' "$name" ;;
      *:log_dir:*) printf '  --log_dir=%s/TIME\n' "${default%/*}" ;;
      *) printf '  --%s=%s\n' "$name" "$default" ;;
    esac
    printf '      %s\n' "${FLAG_HELP[$name]}"
  done
}

is_on() { [[ ${FLAG[$1]} == true ]]; }

die() {  # MESSAGE: a mistake of the user, one line, exit code 2
  echo "error: $*" >&2
  exit 2
}

need() {  # PROGRAM HOW_TO_GET_IT
  if is_on dry_run || command -v "$1" >/dev/null; then return; fi
  die "no program \"$1\" on the PATH; $2"
}

# ---- The secret ----

# With it the processes of a run prove that they belong to the run. It is passed
# in the environment or in a file that only its owner can read: command lines
# are visible to others and in logs.
make_secret() {
  if is_on dry_run; then
    cat <<'END'
export NARVL_CLUSTER_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
END
  elif [[ -z ${NARVL_CLUSTER_SECRET-} ]]; then
    NARVL_CLUSTER_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    export NARVL_CLUSTER_SECRET
  fi
}

# Variables that the hosts of a cloud get too, if they are set here.
PASSED_ON=(NARVL_CLUSTER_SECRET JAX_COMPILATION_CACHE_DIR HF_TOKEN
  WANDB_API_KEY WANDB_BASE_URL WANDB_ENTITY WANDB_MODE
  TRACKIO_SPACE_ID TRACKIO_SERVER_URL TRACKIO_WRITE_TOKEN
  AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
  AWS_REGION AWS_DEFAULT_REGION AWS_ENDPOINT_URL GOOGLE_CLOUD_PROJECT)

passed_on() {  # Their names, in one line.
  local name names=
  for name in "${PASSED_ON[@]}"; do
    if [[ $name == NARVL_CLUSTER_SECRET || -n ${!name-} ]]; then
      names+=" $name"
    fi
  done
  echo "${names# }"
}

note_credentials() {
  if [[ -n ${GOOGLE_APPLICATION_CREDENTIALS-} ]]; then
    stage "note: GOOGLE_APPLICATION_CREDENTIALS names a file of this machine" \
      "and is not passed on; the hosts use their service account"
  fi
}

# ---- Running commands ----

say() { printf '[%5ds] %s\n' "$SECONDS" "$*"; }

stage() {  # TEXT: a comment in a dry run, a line with the time otherwise
  if is_on dry_run; then echo "# $*"; else say "$*"; fi
}

quote() {  # WORDS: as one line that a shell reads as the same words
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      line+=" $word"
    elif [[ $word =~ ^(--[a-z._-]+=)(.*)$ ]]; then
      line+=" ${BASH_REMATCH[1]}$(quoted "${word#*=}")"
    else
      line+=" $(quoted "$word")"
    fi
  done
  printf '%s\n' "${line# }"
}

quoted() { printf '%s' "${1@Q}"; }

run() {  # COMMAND: runs it, or prints it in a dry run
  if is_on dry_run; then
    quote "$@"
  else
    wait_for "$@"
  fi
}

run_line() {  # COMMAND_LINE: the same for what only a shell can do
  if is_on dry_run; then
    echo "$1"
  else
    wait_for bash -o pipefail -c "$1"
  fi
}

query() {  # COMMAND: what it prints; its errors go to a file
  "$@" 2>>"${FLAG[log_dir]}/query.log" </dev/null
}

# In the background, because bash handles a signal only between commands.
wait_for() {  # COMMAND OR FUNCTION
  local code=0
  "$@" </dev/null &
  CHILD=$!
  wait "$CHILD" || code=$?
  CHILD=
  return "$code"
}

pause() { wait_for sleep "$1"; }

is_final() {  # EXIT_CODE: done, mistake of the user, gave up waiting, stopped
  case $1 in 0 | 2 | 124 | 130 | 143) return 0 ;; *) return 1 ;; esac
}

with_retries() {  # COMMAND OR FUNCTION
  local code delay=${FLAG[backoff_seconds]}
  for ((ATTEMPT = 1; ; ATTEMPT++)); do
    code=0
    "$@" || code=$?
    if is_final "$code"; then return "$code"; fi
    if ((ATTEMPT > ${FLAG[retries]})); then
      say "attempt $ATTEMPT failed with exit code $code; no retry is left" \
        "(--retries=${FLAG[retries]})"
      return "$code"
    fi
    say "attempt $ATTEMPT failed with exit code $code;" \
      "retry $ATTEMPT of ${FLAG[retries]} in $delay s"
    pause "$delay"
    if ((delay < MOST_DELAY)); then
      delay=$((delay * 2 < MOST_DELAY ? delay * 2 : MOST_DELAY))
    fi
  done
}

# ---- Stopping ----

stop_training() { :; }  # Hook: TERM to all hosts, wait for the save, KILL.

finish() { :; }  # Hook: collects the logs; always called once at the end.

on_signal() {  # NAME NUMBER
  trap '' INT TERM
  if [[ -n $TRAINING ]]; then
    say "$1: TERM to the training processes; up to" \
      "${FLAG[grace_seconds]} s for the save, then KILL"
    stop_training
  fi
  if [[ -n $CHILD ]]; then kill -TERM -- "-$CHILD" 2>/dev/null || true; fi
  finish
  say "$1: stopped; the same command resumes from the last checkpoint"
  exit $((128 + $2))
}

trap 'on_signal INT 2' INT
trap 'on_signal TERM 15' TERM

launch() {  # COMMAND OR FUNCTION: runs it, collects the logs, exits.
  local code=0
  is_on dry_run || mkdir -p "${FLAG[log_dir]}"
  "$@" || code=$?
  finish
  if ! is_on dry_run; then
    say "ended with exit code $code; logs: ${FLAG[log_dir]}"
  fi
  exit "$code"
}

ends_within() {  # SECONDS PIDS: false if one is alive after that
  local deadline=$((SECONDS + $1)) pid alive
  shift
  while :; do
    alive=
    for pid; do
      if kill -0 "$pid" 2>/dev/null; then alive=$pid; fi
    done
    if [[ -z $alive ]]; then return 0; fi
    if ((SECONDS >= deadline)); then return 1; fi
    sleep 0.1
  done
}
