#!/bin/sh
# Cuts the adapter of a finished run: several sizes are measured on its held-out rows against the adapter as trained, and the
# smallest that loses at most so much of the gain, with its whole interval, becomes a run folder of its own. --to 0.5M or
# --to "rank 8" names a size instead.
set -e
lorakeet compress runs/dates --tolerance 50% --out runs/dates-small
