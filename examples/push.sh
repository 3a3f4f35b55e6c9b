#!/bin/sh
# Shares a run on a model hub: adapter, model card, certificate and report, compared with what the hub then has. First: hf auth login
set -e
lorakeet push runs/dates me/dates --base HuggingFaceTB/SmolLM2-135M-Instruct --private
