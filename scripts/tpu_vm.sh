#!/bin/sh
# Train on a Cloud TPU slice, from creating it to fetching the results. docs/tpu-vm.md walks through it.
#
#   scripts/tpu_vm.sh [--dry_run] create | setup | run [ARGUMENT OF train.py ...] | log | stop | fetch | keep [...] | delete
#
#   create  the slice                         log     follow worker 0's output
#   setup   this commit on every worker       stop    SIGTERM to every worker: each saves and ends
#   run     train.py on every worker          fetch   pictures, metrics and configuration, from WORKDIR into ./runs
#   delete  the slice (asks nothing)          keep    run; where the slice is taken away, create, setup and run again
#
# --dry_run prints the commands and runs none. Set by environment variables:
#   TPU_NAME=jaxgen  TPU_ZONE=us-west4-a  TPU_TYPE=v5litepod-16  TPU_SPOT=1 (can be taken away, costs a third)
#   TPU_RUNTIME (by default the one for TPU_TYPE)  WORKDIR=gs://BUCKET/runs/NAME (needed by run, fetch and keep)
set -eu

name=${TPU_NAME:-jaxgen} zone=${TPU_ZONE:-us-west4-a} type=${TPU_TYPE:-v5litepod-16}
case $type in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime= ;;
esac
runtime=${TPU_RUNTIME:-$runtime}
dry=

fail() { echo "error: $*" >&2; exit 2; }

# Prints a command as it could be typed, and runs it unless this is a dry run.
do_() {
  line=
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=,@%+~-]*|'') word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
  [ -n "$dry" ] || "$@"
}

on() { worker=$1; shift; do_ gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$worker" --command="$1"; }

create() {
  [ -n "$runtime" ] || fail "TPU_TYPE=$type: known are v4-N, v5litepod-N, v5p-N, v6e-N; for another set TPU_RUNTIME"
  do_ gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$runtime" ${TPU_SPOT:+--spot}
}

setup() {
  [ -z "$(git status --porcelain)" ] || echo "warning: what is not committed does not travel" >&2
  do_ git archive --format=tar.gz --output=/tmp/jaxgen.tar.gz HEAD
  do_ gcloud compute tpus tpu-vm scp /tmp/jaxgen.tar.gz "$name:" --zone="$zone" --worker=all
  on all "mkdir -p jaxgen && tar -xzf jaxgen.tar.gz -C jaxgen && python3 -m pip install --quiet --user uv && cd jaxgen && python3 -m uv sync --quiet --extra tpu --extra gcs"
}

workdir() {
  case ${WORKDIR:-} in
    gs://*) ;;
    *) fail "set WORKDIR=gs://BUCKET/runs/NAME: all workers write there, and it outlives the slice" ;;
  esac
}

run() {
  workdir
  arguments=
  for word in "$@"; do
    arguments="$arguments '$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
  done
  on all "cd jaxgen && { nohup python3 -m uv run --extra tpu --extra gcs train.py --workdir=$WORKDIR$arguments >train.log 2>&1 </dev/null & }"
}

log() { on 0 "tail -n +1 -F jaxgen/train.log"; }

stop() { on all "pkill -TERM -f '[t]rain.py --workdir=' || true"; }

fetch() {
  workdir
  do_ mkdir -p "runs/${WORKDIR##*/}"
  for part in config.json metrics.jsonl samples; do
    do_ gcloud storage cp --recursive "$WORKDIR/$part" "runs/${WORKDIR##*/}/"
  done
}

delete() { do_ gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet; }

state() { gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || echo NONE; }

keep() {
  workdir
  run "$@"
  [ -z "$dry" ] || { echo "# every minute: if it is PREEMPTED, TERMINATED or gone: delete, create, setup, run"; return; }
  while sleep 60; do
    case $(state) in
      PREEMPTED|TERMINATED|NONE)
        echo "the slice was taken away; a new one is made"
        delete || true
        until create; do sleep 300; done
        setup
        run "$@"
        ;;
    esac
  done
}

[ "${1:-}" != --dry_run ] || { dry=1; shift; }
case ${1:-} in
  create|setup|run|log|stop|fetch|keep|delete) "$@" ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; [ "${1:-}" = --help ] || exit 2 ;;
esac
