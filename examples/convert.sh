#!/bin/sh
# Writes the adapter of a finished run in another program's format; it is read back and compared number by number.
set -e
lorakeet convert runs/dates runs/dates-mlx --to mlx                      # a folder for mlx-lm
lorakeet convert runs/dates-mlx runs/dates-peft --to peft                # and back
