#!/bin/sh
# Half, once and twice the learning rate, trained in one pass over the base; the best is compared with the run file's own on rows
# that did not choose it. For a real search give a budget: --minutes 30, and what to choose between (lorakeet tune --help).
set -e
lorakeet tune examples/completion.yaml --quick --results runs/dates-tune
lorakeet finetune runs/dates-tune/config.yaml --out runs/dates-tuned
