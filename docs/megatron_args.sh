#!/bin/bash
# A small hybrid, as a training script of Megatron-LM's has it.
HIDDEN=512

torchrun --nproc_per_node 2 pretrain_hybrid.py \
  --hybrid-layer-pattern "M-M-M*-" --hidden-size ${HIDDEN} --ffn-hidden-size 2048 --squared-relu \
  --mamba-num-heads 16 --mamba-head-dim 64 --mamba-state-dim 128 --mamba-num-groups 8 \
  --num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 64 \
  --position-embedding-type none --normalization RMSNorm --disable-bias-linear --hidden-dropout 0 \
  --untie-embeddings-and-output-weights --vocab-size 32000 --seq-length 4096 --max-position-embeddings 4096 \
  --tensor-model-parallel-size 2 --micro-batch-size 4 --lr 2.5e-4 --bf16
