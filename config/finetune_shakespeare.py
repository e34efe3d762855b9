"""Shakespeare by GPT-2: prepare with `python data/shakespeare/prepare.py`, then sample with --out_dir=out-shakespeare.

Made for one GPU of 16 GB. Full fine-tuning needs 16 bytes a parameter (weight, gradient and two averages) and the
activations: gpt2 3 GB, gpt2-medium 7, gpt2-large 14, gpt2-xl 27. To go further, or when memory is short, one by one:
--block_size=512, --checkpoint_activations, a smaller init_from, or --lora_rank=16 --learning_rate=3e-4, which needs
4 bytes a parameter, so that gpt2-xl fits.
"""
out_dir = 'out-shakespeare'
dataset = 'shakespeare'
wandb_project = 'shakespeare'
wandb_run_name = 'finetune'

init_from = 'gpt2-medium'
dropout = 0.1  # 302 thousand tokens are soon learned by heart

# 1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens an iteration, so an epoch is 9 of them
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 60
eval_interval = 5  # the best model comes early, and only that is kept in ckpt.pt
eval_iters = 35  # as many windows as the validation text has
patience = 4
log_interval = 1

learning_rate = 3e-5  # a twentieth of pretraining's: the weights are good already
decay_lr = False
warmup_iters = 0

if device == 'cpu':  # minutes instead of hours: the smallest, on short windows
    init_from, block_size, gradient_accumulation_steps = 'gpt2', 128, 8
    max_iters, eval_interval, eval_iters = 20, 10, 10
