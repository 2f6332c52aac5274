#!/usr/bin/env bash
# Download models to where lacy looks for them, so that no worker does:  bake-models.sh "MODEL MODEL ..."
# Embedded models go to $LACY_HOME/models, models of the hub to $HF_HOME (of their weights only safetensors).
# Run it in the source folder; of that, lacy/__init__.py, labelers/ and schemas/ are enough.
set -euo pipefail

ln -sfn ../schemas ../labelers lacy/
HF_HUB_OFFLINE=0 "${PYTHON:-python}" - "$@" <<'EOF'
import sys

from huggingface_hub import snapshot_download

from lacy.labelers.grammar import load_pipeline
from lacy.labelers.llm.model_folders import PACKAGED, get_model

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]

print("spaCy pipeline:", load_pipeline().meta["name"])
for model in " ".join(sys.argv[1:]).split():
    print(f"{model}:", get_model(model) if model in PACKAGED else snapshot_download(model, allow_patterns=FILES))
EOF
chmod -R a+rX "$LACY_HOME"
chmod 1777 "$LACY_HOME"  # any user may fetch another model from a bucket
