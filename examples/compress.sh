#!/bin/sh
# Cuts the adapter of a finished run to a named size, and compares it with the uncut adapter on the run's held-out rows. Without --to
# the smallest size is taken that is shown to be as good. That needs more held-out rows than this example has.
set -e
lorakeet compress runs/dates --to "rank 2" --out runs/dates-small
