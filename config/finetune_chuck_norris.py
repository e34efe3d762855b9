"""Fine-tune GPT-2 on Chuck Norris facts. Prepare them with `python data/chucknorris/prepare.py`.

This is the recipe of the WHY42 tutorial, which ended at a training loss of 2.4478 and a validation loss of 3.3339.
20 updates read the 1,500 facts several times, so the model begins to memorise them.
config/finetune_chuck_norris_better.py lowers the rate and keeps the best model.

Needs 7 GB of GPU memory; --init_from=gpt2 needs 3, --init_from=gpt2-large 14.
"""
out_dir = 'out-chuck-norris'
dataset = 'chucknorris'
wandb_project = 'chuck-norris'
wandb_run_name = 'mini-gpt'

init_from = 'gpt2-medium'

# 1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens per update
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # keep the model with the lowest validation loss

learning_rate = 3e-5  # as in nanoGPT's fine-tuning config
decay_lr = False
warmup_iters = 0

if not device.startswith('cuda'):  # a CPU or a Mac: the smallest GPT-2, on short windows
    init_from = 'gpt2'
    block_size = 128
    gradient_accumulation_steps = 8
    eval_iters = 10
