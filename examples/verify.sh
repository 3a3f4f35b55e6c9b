#!/bin/sh
# Checks whether the adapter would load in Ollama, then compares the exported folder with the live adapter on held-out rows.
# Exit code 3, with the worst layer or the first diverging token, if they differ.
set -e
lorakeet verify runs/dates --deploy ollama
lorakeet verify runs/dates --against runs/dates-ollama --rows 4
