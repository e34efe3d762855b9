"""Generate text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"    a model that you trained
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt        OpenAI's GPT-2, with a prompt from a file
    python sample.py --temperature=0 --num_samples=1                    the most likely continuation
    python sample.py --out_dir=out-dialogue --chat                      a conversation, with a model of dialogues

Config files and --key=value flags override the settings below. lib/generate.py has the rules for choosing a token.
"""
import sys

import torch

from configurator import configure, find_path
from lib.chat import open_conversation, print_answer, talk
from lib.generate import generate_text
from lib.machine import console, runtime
from lib.machine import device as devices
from lib.text.prompt import encode_prompt, fit_to_vocabulary, read_prompt, typed
from lib.weights.load_model import load_model

# model
init_from = 'resume'  # resume (OUT_DIR/ckpt.pt) | gpt2 ... gpt2-xl | a run's folder or one with GPT-2 weights
out_dir = 'out'  # folder of the training run, relative to the working directory

# text
start = '\n'  # the prompt, or FILE:prompt.txt; empty: start a new text
fold = True  # convert the prompt to the character width of the training text: ':' to '：' and the reverse
num_samples = 10  # samples, generated together
max_new_tokens = 500  # tokens per sample, at most
stop = ''  # text that ends a sample and is not printed; '' = none. End-of-text always ends one
chat = False  # a conversation in the terminal; with --start one answer and nothing else
stream = False  # print text as it comes; on a terminal unless given

# choosing a token
temperature = 0.8  # below 1 safer, above 1 more surprising, 0 always the most likely token
top_k = 200  # sample from the k most likely tokens; 0 = off
top_p = 1.0  # sample from the smallest set of tokens with this total probability; 1 = off
min_p = 0.0  # sample from the tokens at least this fraction as likely as the most likely one; 0 = off
repetition_penalty = 1.0  # above 1 avoids tokens that occurred, 1.1 to 1.3 is usual; 1 = off
no_repeat_ngram = 0  # no sequence of this many tokens occurs twice; 0 = off
seed = 1337  # the same seed gives the same samples; more samples leave the first ones unchanged, but for rounding

# machine
device = 'auto'  # cpu | cuda | cuda:1 | mps; the best available unless given
dtype = 'auto'  # of weights and arithmetic: float32 | bfloat16 | float16 | int8 (CPU); what is fast unless given
compile = False  # torch.compile: takes a minute or more to start, for long runs only


def check(s):
    """Return a list of errors in the Settings `s`."""
    valid = {
        'num_samples': (s['num_samples'] >= 1, 'at least 1'),
        'temperature': (0 <= s['temperature'] < float('inf'), '0 (the most likely token) or more'),
        'top_k': (s['top_k'] >= 0, '0 (off) or more'),
        'top_p': (0 < s['top_p'] <= 1, 'above 0 and at most 1 (off)'),
        'min_p': (0 <= s['min_p'] <= 1, '0 (off) to 1'),
        'repetition_penalty': (0 < s['repetition_penalty'] < float('inf'), 'above 0; 1 is off'),
        **{name: (s[name] >= 0, '0 or more') for name in ('max_new_tokens', 'no_repeat_ngram', 'seed')},
        'dtype': (s['dtype'] in ('auto', 'int8', *devices.DTYPES), f'one of {", ".join(devices.DTYPES)}, int8'),
    }
    errors = [f'{name} must be {wanted}, got {s[name]}' for name, (fine, wanted) in valid.items() if not fine]
    if s['start'].startswith('FILE:') and not find_path(s['start'][5:]).exists():
        errors.append(f'start={s["start"]}: there is no such file')
    if problem := devices.device_problem(s['device']):
        errors.append(problem)
    elif s['dtype'] == 'int8' and s['device'] != 'cpu':
        errors.append(f'dtype=int8 is for CPUs, got device={s["device"]}; use bfloat16, or --device=cpu')
    return errors


def show(pieces, prompt, live):
    """Print the samples in order, each followed by 15 hyphens; with `live`, print the current one token by token."""
    waiting, ended, row = [prompt] * num_samples, [False] * num_samples, 0
    for i, piece, last in pieces:
        waiting[i] += piece
        ended[i] = last
        while row < num_samples and (live or ended[row]):
            print(waiting[row], end='', flush=live)
            waiting[row] = ''
            if not ended[row]:
                break
            print('\n' + '-' * 15, flush=True)
            row += 1
        if console.stdout_lost():  # the reader, such as `head`, has ended
            return


def main(argv=None):
    settings = configure(globals(), argv, early={'device': devices.pick_device}, check=check)
    rt = runtime.start(settings)
    model, tok, state = load_model(init_from, out_dir, torch.int8 if dtype == 'int8' else rt.dtype)
    model = model.to(rt.device, rt.dtype)
    if compile:
        model = torch.compile(model)
    prompt = read_prompt(start)
    if not settings.was_set('start') and tok.kind == 'char' and prompt not in tok.chars:
        prompt = ''  # a text of one line has no newline to begin with
    prompt, stop_text = fit_to_vocabulary(prompt, typed(stop), tok, fold)
    live = stream if settings.was_set('stream') else sys.stdout.isatty()
    rules = dict(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                 repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram)
    if chat:
        conversation = open_conversation(model, tok, state, max_new_tokens=max_new_tokens, **rules)
        if settings.was_set('start'):
            print_answer(conversation, prompt, live)
        else:
            talk(conversation, live, lambda text: fit_to_vocabulary(text, '', tok, fold)[0])
        return
    pieces = generate_text(model, tok, encode_prompt(prompt, tok), num_samples, max_new_tokens, stop=stop_text,
                           live=live, **rules)
    show(pieces, prompt, live)


if __name__ == '__main__':
    main()
