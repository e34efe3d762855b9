"""Evaluate OpenAI's GPT-2 with 774M parameters on OpenWebText: `python train.py config/eval_gpt2_large.py`.

nanoGPT's README gives 2.67 for the validation split; the printed loss, over the whole split, should come close. GPT-2
was trained on WebText, which was never released, so a model trained on OpenWebText itself reaches a lower loss.
"""
init_from = 'gpt2-large'
dataset = 'openwebtext'
eval_only = True  # print the losses and write nothing

batch_size = 8  # the logits take 4 GB, the weights 3.1; a smaller batch gives the same result
