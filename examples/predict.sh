#!/bin/sh
# Answers rows with a finished run (here that of examples/completion.yaml), and writes each row with its answer beside it.
set -e
lorakeet predict runs/dates --data examples/data/more_dates.jsonl --out answered.jsonl
