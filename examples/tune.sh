#!/bin/sh
# Trains half, once and twice the learning rate in one pass over the base, and compares the best with the run file's own on rows that
# did not choose it. For a real search give a budget, --minutes 30, and what to choose between (lorakeet tune --help).
set -e
lorakeet tune examples/completion.yaml --try-rates --results runs/dates-tune
lorakeet finetune runs/dates-tune/config.yaml --out runs/dates-tuned
