#!/bin/sh
# Writes the merged model as a folder for Ollama: Modelfile, GGUF file, a README with the run's own figures, and the certificate
# that llama.cpp computes the same. With Ollama running, --push makes the model there.
set -e
lorakeet export runs/dates --to ollama --out runs/dates-ollama
