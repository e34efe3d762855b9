"""A GPT of 12 layers x 768 with today's recipe, from scratch on OpenWebText. config/train_gpt2.py is the classic one.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py

RoPE, RMSNorm, squared ReLU, QK-norm and Muon, as in modded-nanogpt's records 5 to 8, which reached GPT-2's loss (3.28
on FineWeb) after 2.4 to 2.7 billion tokens; its classic baseline took 10 billion. The untied head is from record 8, the
soft cap from a later one. This config trains on 2.6 billion tokens. It has not been run to its end.
"""
out_dir = 'out-gpt2-modern'
dataset = 'openwebtext'
wandb_project = 'owt'
wandb_run_name = 'gpt2-modern'

# 16 sequences x 1024 tokens x 32 micro-batches = 524,288 tokens per update, over all GPUs together
batch_size = 16  # for 40 GB or more; on a smaller GPU fewer are chosen, for the same update
block_size = 1024
gradient_accumulation_steps = 4 * 8

n_head = 6  # heads of 128, as in modded-nanogpt; H100s compute attention faster than with 64 (FlashAttention-3's paper)
pos = 'rope'
norm = 'rmsnorm'
mlp = 'relu2'
qk_norm = True
tie_weights = False
softcap = 15.0

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 2e-3
min_lr = 0.0
weight_decay = 0.1
lr_schedule = 'wsd'
cooldown_frac = 0.5
warmup_iters = 100
max_iters = 5000

eval_interval = 250
eval_iters = 200
log_interval = 10
