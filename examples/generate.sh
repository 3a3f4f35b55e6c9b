#!/bin/sh
# Draws with the adapter of a run: at full weight, at half, and without it, from the same noise.
set -e
lorakeet generate --prompt "red box" --adapter runs/photos --out pictures/whole
lorakeet generate --prompt "red box" --adapter photos=runs/photos --weights photos=0.5 --out pictures/half
lorakeet generate --prompt "red box" --prompt "red box" --adapter photos=runs/photos --each base,photos --out pictures/both
