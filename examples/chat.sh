#!/bin/sh
# A reply for each line of a pipe, by base and adapter side by side; without the pipe, a conversation in the terminal.
set -e
lorakeet chat runs/dates --temperature 0 --max-tokens 16 <<'LINES'
/both
The 6th of March 1971: we met in Oslo. Date:
LINES
