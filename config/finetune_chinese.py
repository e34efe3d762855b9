"""Your Chinese text by GPT-2: put it at data/chinese/input.txt, run `python data/chinese/prepare.py`.

GPT-2 read hardly any Chinese, and its tokens spend two or three ids on a character: it learns to write from a megabyte
or more, not to know. A small model of your own with --tokenizer=bpe or char often does better; compare bits per byte
(python evaluate.py). Needs 6 GB of GPU memory; lower batch_size (and raise gradient_accumulation_steps) first.
"""
out_dir = 'out-chinese'
dataset = 'chinese'
wandb_project = 'chinese'
wandb_run_name = 'finetune'

init_from = 'gpt2'
dropout = 0.1

# 4 x 512 x 8 = 16,384 tokens an iteration, some 7,000 characters
block_size = 512
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 2000
eval_interval = 100
eval_iters = 50
patience = 5
log_interval = 10

learning_rate = 2e-4  # higher than for English: there is more to learn than to keep
warmup_iters = 100

if device == 'cpu':
    block_size, batch_size, max_iters = 128, 4, 200
