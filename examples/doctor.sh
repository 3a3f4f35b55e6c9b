#!/bin/sh
# Says what this machine has and lacks, with the commands that mend it; exit code 2 where something required is missing.
lorakeet doctor
