#!/bin/sh
# Cuts the adapter of a finished run. Several sizes are compared with the trained adapter on its held-out rows. The smallest whose
# loss of gain is below the tolerance, with its whole interval, becomes a run folder of its own. --to 0.5M or --to "rank 8" names a
# size instead.
set -e
lorakeet compress runs/dates --tolerance 50% --out runs/dates-small
