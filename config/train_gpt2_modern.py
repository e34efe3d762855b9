"""A GPT of 12 layers x 768 by today's recipe, from scratch on OpenWebText; config/train_gpt2.py is the classic one.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py

RoPE, RMSNorm, squared ReLU, QK-norm and Muon, as in modded-nanogpt's records 5 to 8, which reached GPT-2's loss (3.28
on FineWeb) after 2.4 to 2.7 billion tokens where its classic start took 10; the untied head is that of record 8, the
soft cap of later ones. This file asks for 2.6 billion tokens; it has not been run to its end yet.
"""
out_dir = 'out-gpt2-modern'
dataset = 'openwebtext'
wandb_project = 'owt'
wandb_run_name = 'gpt2-modern'

# 16 sequences x 1024 tokens x 32 micro-batches = 524,288 tokens an iteration, over all GPUs together
batch_size = 16  # for 40 GB or more; on 16 GB --batch_size=4 --gradient_accumulation_steps=128 is the same iteration
block_size = 1024
gradient_accumulation_steps = 4 * 8

pos, norm, mlp = 'rope', 'rmsnorm', 'relu2'
qk_norm, tie_weights, softcap = True, False, 15.0

optimizer, muon_lr, learning_rate, min_lr = 'muon', 0.02, 2e-3, 0.0
weight_decay = 0.1
lr_schedule, cooldown_frac, warmup_iters = 'wsd', 0.5, 100
max_iters = 5000

eval_interval = 250
eval_iters = 200
log_interval = 10
