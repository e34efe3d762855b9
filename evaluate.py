"""Measure a model: loss, perplexity and bits per byte of a text, or accuracy on HellaSwag or LAMBADA.

    python evaluate.py --out_dir=out-shakespeare                     the whole validation split it was trained beside
    python evaluate.py --init_from=gpt2 --text=book.txt --stride=512 a text file; each token sees 512 or more before it
    python evaluate.py --init_from=gpt2-xl --task=hellaswag          downloads the public file once
    python evaluate.py --task=lambada --input=lambada_test.jsonl     or reads a local one

Losses are means over tokens, in nats. Windows of block_size tokens start every `stride` tokens, and each scores what
no window before it did: with the default, block_size, they lie side by side as in train.py's final evaluation; with 1
every token has the longest possible context. Bits per byte divides by the bytes of the text, so models with different
tokenizers compare. The tasks' rules are in lib/tasks.py.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError, configure, find_path
from lib import tasks
from lib.machine import runtime
from lib.machine.device import DTYPES, device_problem, pick_device
from lib.text import dataset as datasets
from lib.text import read_text as read_text_room
from lib.text.tokenizer import describe_mismatch
from lib.training import log
from lib.weights.load_model import load_model

# model
init_from = 'resume'  # resume (OUT_DIR/ckpt.pt) | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a folder with GPT-2 weights
out_dir = 'out'  # folder of the training run, relative to the working directory

# what to measure on
dataset = ''  # folder under data/; '' the one that the checkpoint was trained on, openwebtext for GPT-2
split = 'val'  # val | train
text = ''  # a text file instead of a dataset, its line ends as they are; '' none
encoding = 'utf-8'  # of the text file, for example gb18030
stride = 0  # tokens between the starts of windows, 1 to block_size; 0 block_size
task = ''  # hellaswag | lambada; '' none
input = ''  # the task's JSON lines in a local file; '' downloads them to data/TASK/
limit = 0  # items of the task, from its beginning; 0 all

# machine
batch_size = 8  # windows, or texts of a task, at once; lower it when memory is short
device = 'auto'  # cpu | cuda | cuda:1 | mps; the best there is unless given
dtype = 'auto'  # of the arithmetic: float32 | bfloat16 | float16; what the device does fast unless given
compile = False  # torch.compile: pays for long texts only


def check(s):
    """Return what is wrong with the Settings `s`, a line each."""
    rules = {
        'split': (s['split'] in ('train', 'val'), 'train or val'),
        'stride': (s['stride'] >= 0, '0 (block_size) or more'),
        'task': (s['task'] in ('', *tasks.URL), f'one of {", ".join(tasks.URL)}'),
        'limit': (s['limit'] >= 0, '0 (all) or more'),
        'batch_size': (s['batch_size'] >= 1, 'at least 1'),
        'dtype': (s['dtype'] in ('auto', *DTYPES), f'one of {", ".join(DTYPES)}'),
    }
    found = [f'{name} must be {wanted}, got {s[name]!r}' for name, (fine, wanted) in rules.items() if not fine]
    found += read_text_room.encoding_problems(s['encoding'])
    found += [f'{name}={s[name]}: there is no such file' for name in ('text', 'input')
              if s[name] and not find_path(s[name]).is_file()]
    if sum(bool(s[name]) for name in ('dataset', 'text', 'task')) > 1:
        found.append('dataset, text and task exclude each other; give one')
    problem = device_problem(s['device'])
    return found + [problem] * bool(problem)


def windows(n_tokens, block_size, stride):
    """Yield (start, length, fresh): a window's first token, how many it reads, and how many targets at its end count.

    Token 0 is no target; every other one counts exactly once.
    """
    done = start = 0
    while done < n_tokens - 1:
        end = min(start + block_size, n_tokens - 1)
        yield start, end - start, end - done
        done, start = end, start + stride


@torch.inference_mode()
def split_nats(model, rt, tokens, block_size, stride):
    """Return the summed loss in nats over the N - 1 targets of `tokens`, a datasets.Split."""
    nats, batch = 0.0, []

    def score():
        starts, lengths, fresh = map(np.array, zip(*batch))
        idx, targets = tokens.batch(starts, int(lengths[0]))  # (B, T) each
        targets = targets.masked_fill(torch.arange(lengths[0]) < torch.tensor(lengths - fresh)[:, None], -1)
        return float(model(*rt.to_device(idx, targets))[1]) * int(fresh.sum())

    count = 1 + max(0, -(-(len(tokens) - 1 - block_size) // stride))
    for window in log.progress(windows(len(tokens), block_size, stride), count, 'windows'):
        if batch and (len(batch) == batch_size or window[1] != batch[0][1]):
            nats, batch = nats + score(), []
        batch.append(window)
    return nats + (score() if batch else 0.0)


@torch.inference_mode()
def continuation_nats(model, rt, rows):
    """Return (nats, n_tokens, exact) of continuations: their summed losses, lengths, and whether all were likeliest.

    rows: (context ids, continuation ids) each. What is longer than block_size + 1 loses its beginning.
    """
    results = []
    firsts = range(0, len(rows), batch_size)
    for first in log.progress(firsts, len(firsts), 'batches'):
        whole = [(context + end)[-model.config.block_size - 1:] for context, end in rows[first:first + batch_size]]
        fresh = [min(len(end), len(ids) - 1) for (_, end), ids in zip(rows[first:first + batch_size], whole)]
        T = max(map(len, whole)) - 1
        idx, targets = torch.zeros(len(whole), T, dtype=torch.long), torch.full((len(whole), T), -1)  # (B, T) each
        for row, (ids, n) in enumerate(zip(whole, fresh)):  # padded at the end, where a causal model sees nothing
            idx[row, :len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, len(ids) - 1 - n:len(ids) - 1] = torch.tensor(ids[-n:])
        idx, targets = rt.to_device(idx, targets)
        counted = targets >= 0
        logits = model(idx, targets)[0][counted].float()  # (counted targets of all rows, V)
        losses = F.cross_entropy(logits, targets[counted], reduction='none').split(fresh)
        likeliest = (logits.argmax(-1) == targets[counted]).split(fresh)
        results += [(float(loss.sum()), n, bool(hit.all())) for loss, n, hit in zip(losses, fresh, likeliest)]
    return results


def run_task(model, tok, rt):
    """Return the line that says how the model does on `task`."""
    items = tasks.read(task, find_path(input) if input else None, limit)
    found = tasks.scores(task, items, continuation_nats(model, rt, tasks.rows(task, items, tok)))
    values = ', '.join(f'{name} {value:.4f}' for name, value in found.items())
    return f'{task}: {values} ({len(items):,} items; {tasks.RULE[task]})'


def read_text(tok):
    """Return the text file as a datasets.Split of the model's tokens."""
    path = find_path(text)
    content = ''.join(read_text_room.chunks(path, encoding))
    ids = np.array(tok.encode(content), dtype=np.uint32)
    return datasets.Split(path, ids, len(content.encode()), '', tok.vocab_size)


def run_text(model, tok, rt, state):
    """Return the line that says the loss on the dataset's split or the text file."""
    block_size = model.config.block_size
    if stride > block_size:
        raise UserError(f'stride={stride} would leave out tokens: the model reads {block_size} at once')
    if text:
        name, tokens = text, read_text(tok)
    else:
        trained_on = state.get('config', {}).get('dataset', 'openwebtext')
        data = datasets.open_dataset(dataset or trained_on, 1)
        if data.tokenizer != tok.spec:
            advice = 'leave --dataset out' if dataset not in ('', trained_on) else 'prepare it as it was in training'
            raise UserError(f'dataset {data.name} does not fit this model: '
                            f'{describe_mismatch(data.tokenizer, tok.spec)}; {advice}, '
                            "or give a text with --text=FILE, which is read with the model's tokenizer")
        name, tokens = f'{split} of {data.name}', getattr(data, split)
    if len(tokens) < 2:
        raise UserError(f'{name} has {len(tokens)} tokens; a loss needs at least 2')
    nats, n = split_nats(model, rt, tokens, block_size, stride or block_size), len(tokens) - 1
    line = f'{name}: loss {nats / n:.4f}, perplexity {math.exp(min(nats / n, 700)):.4f}'
    if tokens.n_bytes:
        line += f', bpb {nats / math.log(2) / tokens.n_bytes:.4f}'
    return f'{line} ({n:,} targets, windows of {block_size}, stride {stride or block_size})'


def main(argv=None):
    settings = configure(globals(), argv, early={'device': pick_device}, check=check)
    settings.setdefault('seed', 0)  # nothing is drawn here
    rt = runtime.start(settings)
    model, tok, state = load_model(init_from, out_dir)
    model.to(rt.device).set_compute_dtype(rt.dtype)  # weights stay float32, as in training
    net = torch.compile(model) if compile else model
    print(f'device: {rt.description}')
    print(run_task(net, tok, rt) if task else run_text(net, tok, rt, state))


if __name__ == '__main__':
    main()
