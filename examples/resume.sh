#!/bin/sh
# Stops a run in the middle and goes on with it. Its adapter has the same bytes as that of a run that nobody stopped.
# Flags are handed on: sh examples/resume.sh --train.epochs 1
run=runs/resumed
lorakeet finetune examples/completion.yaml --out $run "$@" &
while kill -0 $! 2> /dev/null && ! grep -q '"step": 2,' $run/metrics.jsonl 2> /dev/null; do sleep 0.1; done
kill -TERM $! 2> /dev/null          # like Ctrl-C: the step is finished and a checkpoint written; kill -9 loses a few steps
wait $!
set -e
lorakeet finetune --resume $run
