"""The Three Character Classic, to be recited: `python data/sanzijing_char/prepare.py --input=sanzijing.txt` first.

1,367 characters train and 152 validate, so the context has to stay below 152. The model learns the text by heart and
nothing else: training loss goes to zero while validation loss rises, which train.py warns about. To hear the text, keep
the last model, not the best one.
"""
out_dir = 'out-sanzijing-char'
dataset = 'sanzijing_char'
wandb_project = 'sanzijing-char'
wandb_run_name = 'mini-gpt'

always_save_checkpoint = True  # the best on validation text would be one of the first

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
eval_interval = 250
eval_iters = 20
log_interval = 10
