"""GPT-2 with 124M parameters from scratch on OpenWebText. nanoGPT reached a loss of about 2.85 in 4 days on 8 A100.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

On one GPU, `python train.py config/train_gpt2.py` does the same work in eight times the time.
"""
out_dir = 'out-gpt2'
dataset = 'openwebtext'
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens per update, over all GPUs together
batch_size = 12  # for 24 GB or more; on a smaller GPU fewer are chosen, for the same update
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 300 billion tokens, 33 epochs
learning_rate = 6e-4  # GPT-3's for this size
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10
