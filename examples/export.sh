#!/bin/sh
# Writes the merged model as a folder for Ollama: Modelfile, GGUF file, a README with the run's figures, and the certificate that
# llama.cpp computes the same. If Ollama is running, --push creates the model there.
set -e
lorakeet export runs/dates --to ollama --out runs/dates-ollama
