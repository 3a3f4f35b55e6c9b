#!/bin/sh
# Measures a finished run (here that of examples/completion.yaml) on rows that it never saw, and writes a report of it.
set -e
lorakeet evaluate runs/dates --data examples/data/more_dates.jsonl --out reports/more-dates
