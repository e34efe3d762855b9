"""Chuck Norris facts by GPT-2: prepare with `python data/chucknorris/prepare.py`.

Needs 3 GB of GPU memory; --init_from=gpt2-medium needs 7 and --init_from=gpt2-large 14. When that is too much lower
batch_size (and raise gradient_accumulation_steps), then block_size.
"""
out_dir = 'out-chucknorris'
dataset = 'chucknorris'
wandb_project = 'chucknorris'
wandb_run_name = 'finetune'

init_from = 'gpt2'
dropout = 0.1

# facts are a line long, so 256 tokens hold several: 8 x 256 x 4 = 8,192 tokens an iteration
block_size = 256
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 200
eval_interval = 20
eval_iters = 10
patience = 3  # stop when three evaluations brought nothing better
log_interval = 10

learning_rate = 5e-5
warmup_iters = 10  # then the cosine, over max_iters

if device == 'cpu':
    block_size, batch_size, max_iters = 128, 4, 60
