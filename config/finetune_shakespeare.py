"""Fine-tune GPT-2 on Shakespeare. Prepare the text with `python data/shakespeare/prepare.py`.

Made for one GPU with 16 GB. Full fine-tuning needs 16 bytes per parameter (weight, gradient and AdamW's two averages)
and memory for the activations: gpt2 3 GB, gpt2-medium 7, gpt2-large 14, gpt2-xl 27. If memory is short, try in this
order: --block_size=512, --checkpoint_activations, a smaller init_from, or --lora_rank=16 --learning_rate=3e-4, which
needs 4 bytes per parameter, so that gpt2-xl fits.
"""
out_dir = 'out-shakespeare'
dataset = 'shakespeare'
wandb_project = 'shakespeare'
wandb_run_name = 'finetune'

init_from = 'gpt2-medium'
dropout = 0.1  # 302 thousand tokens are soon memorised

# 1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens per update, so an epoch is 9 updates
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 60
eval_interval = 5  # the best model comes early, and only that one is kept in ckpt.pt
eval_iters = 35  # as many windows as the validation split has
patience = 4  # stop after four evaluations without a better one
log_interval = 1

learning_rate = 3e-5  # a twentieth of the rate from scratch: the weights are good already
decay_lr = False
warmup_iters = 0

if not device.startswith('cuda'):  # a CPU or a Mac: the smallest GPT-2, on short windows
    init_from = 'gpt2'
    block_size = 128
    gradient_accumulation_steps = 8
    max_iters = 20
    eval_interval = 10
    eval_iters = 10
