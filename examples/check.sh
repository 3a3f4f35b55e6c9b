#!/bin/sh
# For a pipeline: exit code 0 if the run meets the requirements, 3 if not. Bounds hold at the worse end of the interval.
set -e
lorakeet check runs/dates --loss '<=20' --require 'exact_match >=0' --certificate passed
