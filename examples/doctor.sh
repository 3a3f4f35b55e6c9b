#!/bin/sh
# Says what this machine has and lacks, with the commands that install it; exit code 2 if something required is missing.
lorakeet doctor
