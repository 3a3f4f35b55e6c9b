#!/bin/sh
# Stops a run in the middle and resumes it. Its adapter has the same bytes as that of an uninterrupted run.
# Flags are passed on: sh examples/resume.sh --train.epochs 1
run=runs/resumed
lorakeet finetune examples/completion.yaml --out $run "$@" &
while kill -0 $! 2> /dev/null && ! grep -q '"step": 2,' $run/metrics.jsonl 2> /dev/null; do sleep 0.1; done
kill -TERM $! 2> /dev/null          # like Ctrl-C: finishes the step and writes a checkpoint; kill -9 loses a few steps
wait $!
set -e
lorakeet finetune --resume $run
