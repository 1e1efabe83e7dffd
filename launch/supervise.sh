#!/usr/bin/env bash
# Restarts a training run that fails. From the repository's root:
#
#   launch/supervise.sh [--restarts 20] [--pause 10] [--stuck 3] COMMAND...
#   launch/supervise.sh deepspeed launch/train.py --resume_from_checkpoint auto --output_dir outputs/run ...
#
# The command is one that starts launch/train.py in any way; `--status_file FILE` is appended to it, through which
# rank 0 says how far it has come. Restarted with growing pauses (each twice the one before, at most 10 minutes; the
# first one again after a new checkpoint). Ends
#   with 0                 when the run has finished, or has saved after SIGTERM
#   with 2                 when the command has (a wrong flag)
#   with the run's code    after --restarts restarts, or --stuck failures in a row without a new checkpoint between
#                          (0: no such limit). A code of 0 without the run's own word for it becomes 1: DeepSpeed's
#                          launcher ends with 0 when its helper process is killed.
# SIGTERM and SIGUSR1 are passed on to rank 0, which has all ranks save and leave; if it is not on this host, or has not
# started training, SIGTERM goes to everything that was started. SIGINT ends everything.
set -uo pipefail

restarts=20 pause=10 stuck=3
while [[ $# -gt 0 ]]; do
  case "$1" in
    --restarts | --pause | --stuck)
      if ! [[ "${2-}" =~ ^[0-9]+$ ]]; then
        echo "supervise: $1 needs a whole number, not '${2-}'." >&2
        exit 2
      fi
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --help | -h)
      sed -n '2,18s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    -*)
      echo "supervise: unknown flag '$1'; the command comes after --restarts, --pause and --stuck." >&2
      exit 2
      ;;
    *) break ;;
  esac
done
if [[ $# -eq 0 ]]; then
  echo "supervise: no command. Usage: launch/supervise.sh [--restarts N] [--pause S] [--stuck N] COMMAND..." >&2
  exit 2
fi

# What is needed here, before anything is started whose end could not be learnt.
for program in mktemp setsid sed; do
  if ! command -v "$program" >/dev/null; then
    echo "supervise: $program is not on PATH; nothing was started." >&2
    exit 1
  fi
done
if ! status=$(mktemp) || ! echo "begun" >"$status"; then
  echo "supervise: no status file in ${TMPDIR:-/tmp}; make room there, or name another folder by TMPDIR. Nothing was" \
    "started." >&2
  exit 1
fi
if ! command -v "$1" >/dev/null; then
  echo "supervise: there is no command '$1'; nothing was started." >&2
  exit 2
fi
trap 'rm -f "$status"' EXIT
group=0 told=""

say() { echo "[supervise] $*" >&2; }

# The last words of the status file's lines that begin with $1.
last() { sed -n "s/^$1 //p" "$status" | tail -n 1; }

pass_on() {
  told=$1
  ((group)) || return 0
  read -r pid host <<<"$(last started)"
  if [[ $1 != INT && -n "${pid-}" && "$host" == "$(uname -n)" ]] && kill -s "$1" "$pid" 2>/dev/null; then
    say "SIG$1 is passed on to rank 0 (pid $pid)."
  else
    say "SIG$1: everything that was started is ended."
    kill -s TERM -- "-$group" 2>/dev/null
  fi
}
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
trap 'pass_on INT' INT

# Waits for the command; a signal interrupts `wait`, not the command.
wait_for_end() {
  local code
  while true; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

# Nothing of an attempt may run beside the next one: ranks whose launcher was killed end by themselves, or are ended.
clear_group() {
  for _ in {1..300}; do
    kill -0 -- "-$group" 2>/dev/null || return 0
    sleep 0.1
  done
  say "something still runs after 30 s, and is killed."
  kill -s KILL -- "-$group" 2>/dev/null
}

# Sleeps, but a signal ends the sleep.
pause_for() {
  sleep "$1" &
  wait $!
}

attempt=0 failures=0 wait_seconds=$pause newest=""
while true; do
  : >"$status"
  setsid "$@" --status_file "$status" &
  group=$!
  wait_for_end "$group"
  code=$?
  clear_group
  group=0
  if [[ -n "$(last finished)" ]]; then
    exit 0
  elif [[ -n "$(last preempted)" ]]; then
    say "the run has saved after step $(last preempted)."
    exit 0
  elif [[ $code -eq 2 ]]; then
    exit 2
  elif [[ -n "$told" ]]; then
    exit $((code ? code : 1))
  fi
  reached=$(last checkpoint)
  if [[ -n "$reached" && "$reached" != "$newest" ]]; then
    newest=$reached failures=0 wait_seconds=$pause
  fi
  failures=$((failures + 1)) attempt=$((attempt + 1))
  if ((attempt > restarts)); then
    say "exit code $code; not restarted, after $restarts restarts."
    exit $((code ? code : 1))
  elif ((stuck && failures >= stuck)); then
    say "exit code $code; not restarted: failed $failures times without a new checkpoint (newest: ${newest:-none})."
    exit $((code ? code : 1))
  fi
  say "exit code $code; restart $attempt of $restarts in $wait_seconds s (newest checkpoint: ${newest:-none yet})."
  pause_for "$wait_seconds"
  [[ -n "$told" ]] && exit $((code ? code : 1))
  wait_seconds=$((wait_seconds * 2 > 600 ? 600 : wait_seconds * 2))
done
