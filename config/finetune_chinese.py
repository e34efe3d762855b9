"""Fine-tune GPT-2 on your Chinese text. Put it at data/chinese/input.txt and run `python data/chinese/prepare.py`.

GPT-2 has read hardly any Chinese, and its tokenizer needs two or three tokens per character. From a megabyte of text or
more it learns to write, but not to know anything. A small model from scratch with --tokenizer=bpe or char is often
better; compare bits per byte with `python evaluate.py`. Needs 6 GB of GPU memory; if that is too much, lower batch_size
and raise gradient_accumulation_steps.
"""
out_dir = 'out-chinese'
dataset = 'chinese'
wandb_project = 'chinese'
wandb_run_name = 'finetune'

init_from = 'gpt2'
dropout = 0.1

# 4 x 512 x 8 = 16,384 tokens per update, about 7,000 characters
block_size = 512
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 2000
eval_interval = 100
eval_iters = 50
patience = 5  # stop after five evaluations without a better one
log_interval = 10

learning_rate = 2e-4  # higher than for English: there is more to learn than to keep
warmup_iters = 100

if not device.startswith('cuda'):  # a CPU or a Mac
    block_size = 128
    max_iters = 200
