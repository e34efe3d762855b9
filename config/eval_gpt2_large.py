"""How well OpenAI's GPT-2 with 774M parameters predicts OpenWebText: `python train.py config/eval_gpt2_large.py`.

nanoGPT published 2.67 for the validation split; the last line here, over the whole of it, should come close. GPT-2 was
trained on WebText, which was never released, so a model trained on OpenWebText itself ends lower.
"""
init_from = 'gpt2-large'
dataset = 'openwebtext'
eval_only = True  # print the losses, write nothing

batch_size = 8  # the logits take 4 GB, the weights 3.1; fewer change no result
