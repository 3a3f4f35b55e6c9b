#!/bin/sh
# Says how much memory a run will take, phase by phase, from the shapes alone: no weights are fetched and no rows are read.
set -e
lorakeet plan --model meta-llama/Llama-2-7b-hf --quantize nf4 --rank 16 --tokens 2048
lorakeet plan examples/drug_reviews.yaml --memory 1GiB
