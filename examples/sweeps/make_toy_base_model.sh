#!/usr/bin/env bash
# What toy_initialization.yaml starts from: a DeepSeek-V2 text model with eight experts, trained on the quickstart's
# sentences, and the MoST checkpoints converted from it. It takes a few minutes, after make quickstart.
#
#   examples/sweeps/make_toy_base_model.sh [DIRECTORY]
set -euo pipefail
out="${1:-runs/toy_base_model}"
data=runs/quickstart/data/train_text

python examples/pretrain_most.py --config examples/sweeps/toy_base.yaml run_dir="$out/training" \
    "data.train=[{path: $data}]" "data.validation=[]" training.eval_interval=0 training.train_iters=200 \
    "model.moe.groups=[{modality: text, size: 0, moe_router_topk: 2}, {modality: audio, size: 0, moe_router_topk: 2}]" \
    model.moe.common.size=8 model.moe.balance_scope=pooled
python tools/convert_checkpoint.py export --checkpoint "$out/training" --format deepseek-v2 --without-extension \
    --out "$out/hf"
for experts in partition expand; do
    python tools/convert_checkpoint.py import --hf "$out/hf" --experts "$experts" --audio-vocab frame:4x1000 \
        --out "$out/$experts"
done
