"""Evaluate OpenAI's GPT-2 with 1558M parameters on OpenWebText: `python train.py config/eval_gpt2_xl.py`.

nanoGPT's README gives 2.54 for the validation split; the printed loss, over the whole split, should come close. GPT-2
was trained on WebText, which was never released, so a model trained on OpenWebText itself reaches a lower loss.
"""
init_from = 'gpt2-xl'
dataset = 'openwebtext'
eval_only = True  # print the losses and write nothing

batch_size = 4  # the logits take 2 GB, the weights 6.2; a smaller batch gives the same result
