"""Write text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"    a model of one's own
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt        OpenAI's GPT-2, prompt from a file
    python sample.py --temperature=0 --num_samples=1                    the likeliest continuation, the same each time

Any setting below is overridden by Python config files and by --key=value, which wins. What the samples are drawn with
is in lib/generate.py.
"""
import os
import sys

import torch

from configurator import UserError, configure, find_path
from lib.generate import complete
from lib.machine import runtime
from lib.weights.load_model import load_model

# model
init_from = 'resume'  # resume (OUT_DIR/ckpt.pt) | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a folder with GPT-2 weights
out_dir = 'out'  # folder of the training run, relative to the working directory

# text
start = '\n'  # the prompt, or FILE:prompt.txt; an empty one is the natural beginning of a text
num_samples = 10  # samples, drawn together
max_new_tokens = 500  # tokens a sample, at most
stop = ''  # text that ends a sample and is not printed; '' none. End-of-text always ends one
stream = False  # print text as it comes; on a terminal unless given

# choosing a token
temperature = 0.8  # below 1 safer, above 1 wilder, 0 always the likeliest
top_k = 200  # draw from so many likeliest tokens; 0 off
top_p = 1.0  # draw from the fewest tokens that have this probability together; 1 off
repetition_penalty = 1.0  # above 1 avoids tokens that occurred, 1.1 to 1.3 is usual; 1 off
seed = 1337  # the same seed, the same samples

# machine
device = 'auto'  # cpu | cuda | cuda:1 | mps; the best there is unless given
dtype = 'auto'  # of weights and arithmetic: float32 | bfloat16 | float16; what the device does fast unless given
compile = False  # torch.compile: a minute and more to begin with, for long runs only


def check(s):
    """Return what is wrong with the Settings `s`, a line each."""
    rules = {
        'num_samples': (s['num_samples'] >= 1, 'at least 1'),
        'max_new_tokens': (s['max_new_tokens'] >= 0, '0 or more'),
        'temperature': (0 <= s['temperature'] < float('inf'), '0 (the likeliest token) or more'),
        'top_k': (s['top_k'] >= 0, '0 (off) or more'),
        'top_p': (0 < s['top_p'] <= 1, 'above 0 and at most 1 (off)'),
        'repetition_penalty': (0 < s['repetition_penalty'] < float('inf'), 'above 0; 1 is off'),
        'dtype': (s['dtype'] in ('auto', *runtime.DTYPES), f'one of {", ".join(runtime.DTYPES)}'),
    }
    found = [f'{name} must be {wanted}, got {s[name]}' for name, (fine, wanted) in rules.items() if not fine]
    if s['start'].startswith('FILE:') and not find_path(s['start'][5:]).is_file():
        found.append(f'start={s["start"]}: there is no such file')
    problem = runtime.device_problem(s['device'])
    return found + [problem] * bool(problem)


def typed(argument):
    """Return the text that was typed: under an ASCII locale Python reads its bytes as lone surrogates."""
    return argument.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def read_start():
    """Return the prompt as text; UserError where its file is not UTF-8."""
    if not start.startswith('FILE:'):
        return typed(start)
    try:
        return find_path(start[5:]).read_text(encoding='utf-8-sig')  # Notepad begins a file with a mark; leave it out
    except UnicodeDecodeError as error:
        raise UserError(f'start={start}: not UTF-8 at byte {error.start}; save the file as UTF-8') from None


def encode_start(text, tok):
    """Return the ids of the prompt; an end-of-text mark that it spells out becomes that token."""
    parts = [text] if tok.eot is None else text.split(tok.mark)
    ids = tok.encode(parts[0])
    for part in parts[1:]:
        ids += [tok.eot] + tok.encode(part)
    return ids or tok.start_ids


def load(rt):
    """Return (model, tokenizer) as the settings ask for, on the device and in its dtype; UserError if unusable."""
    model, tok, _ = load_model(init_from, out_dir, rt.dtype)
    model = model.to(rt.device, rt.dtype)
    return (torch.compile(model) if compile else model), tok


def show(pieces, prompt, live):
    """Print the samples in order, each whole, then 15 hyphens; `live` prints the first unfinished one as it grows."""
    waiting, ended, row = [prompt] * num_samples, [False] * num_samples, 0
    for i, piece, last in pieces:
        waiting[i] += piece
        ended[i] = last
        while row < num_samples and (live or ended[row]):
            print(waiting[row], end='', flush=live)
            waiting[row] = ''
            if not ended[row]:
                break
            print('\n' + '-' * 15)
            row += 1


def main(argv=None):
    settings = configure(globals(), argv, early={'device': runtime.pick_device}, check=check)
    rt = runtime.start(settings)
    model, tok = load(rt)
    prompt = read_start()
    if not settings.given('start') and tok.kind == 'char' and prompt not in tok.chars:
        prompt = ''  # a text of one line has no newline to begin with
    live = stream if settings.given('stream') else sys.stdout.isatty()
    show(complete(model, tok, encode_start(prompt, tok), num_samples, max_new_tokens, stop=typed(stop), live=live,
                  seed=seed, temperature=temperature, top_k=top_k, top_p=top_p,
                  repetition_penalty=repetition_penalty), prompt, live)


if __name__ == '__main__':
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
