"""Memorise the Three Character Classic. Prepare it with `python data/sanzijing_char/prepare.py`, which says where the
text is.

The training split has 1,367 characters and the validation split 152, so the context must be shorter than 152. The
model memorises the text and learns nothing else: the training loss falls towards zero while the validation loss rises,
and train.py warns about that. The last model recites the text, so it is kept instead of the best one.
"""
out_dir = 'out-sanzijing-char'
dataset = 'sanzijing_char'
wandb_project = 'sanzijing-char'
wandb_run_name = 'mini-gpt'

always_save_checkpoint = True  # by validation loss the best model would be one of the first

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # memorising is the aim here

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens per update: average over more updates
warmup_iters = 100
max_iters = 2000
eval_interval = 250
eval_iters = 20
log_interval = 10
