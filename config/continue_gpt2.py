"""Continue training OpenAI's GPT-2 on OpenWebText with a small learning rate.

    python train.py config/continue_gpt2.py
    torchrun --standalone --nproc_per_node=8 train.py config/continue_gpt2.py

GPT-2 with 124M parameters starts at a validation loss of about 3.12 there, because it was trained on another text.
nanoGPT's README says that it ends near 2.85, which a model of this size trained from scratch reaches after 4 days on 8
A100. This config has not been run to its end.
"""
out_dir = 'out-gpt2-continued'
dataset = 'openwebtext'
wandb_project = 'owt'
wandb_run_name = 'gpt2-continued'

init_from = 'gpt2'

# 4 sequences x 1024 tokens x 40 micro-batches = 163,840 tokens per update, over all GPUs together
batch_size = 4  # fits 16 GB
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 10000  # 1.6 billion tokens, a fifth of the text

learning_rate = 6e-5  # a tenth of the rate from scratch: the weights are good already
min_lr = 6e-6
warmup_iters = 200

eval_interval = 500
eval_iters = 200
log_interval = 10

if not device.startswith('cuda'):  # a CPU or a Mac: only to see that it works
    block_size = 128
    gradient_accumulation_steps = 8
    max_iters = 20
    warmup_iters = 2
    eval_interval = 10
    eval_iters = 10
    log_interval = 1
