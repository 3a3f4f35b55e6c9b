#!/bin/sh
# Folds the adapter of a finished run into its base: a folder that transformers loads as any other model, with a certificate
# that it computes the same. Exit code 3 if it does not.
set -e
lorakeet merge runs/dates --out runs/dates-merged
