"""Measure a model: loss, perplexity and bits per byte of a text, or accuracy on HellaSwag or LAMBADA.

    python evaluate.py --out_dir=out-shakespeare                     its dataset's whole validation split
    python evaluate.py --init_from=gpt2 --text=book.txt --stride=512 a text file; each token sees 512 or more before it
    python evaluate.py --init_from=gpt2-xl --task=hellaswag          downloads the public file once
    python evaluate.py --task=lambada --input=lambada_test.jsonl     or reads a local one
    python evaluate.py --out_dir=out-shakespeare --samples=20        how much it copies from the training text

Losses are means over tokens, in nats. Windows of block_size tokens start every `stride` tokens; each one scores the
tokens that no earlier window has scored. With the default, block_size, they do not overlap, as in train.py's final
evaluation; with 1 every token has the longest possible context. Bits per byte divide by the bytes of the text, so
models with different tokenizers can be compared. The tasks' rules are in lib/tasks.py.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError, configure, find_path
from lib import novelty, tasks
from lib.generate import generate
from lib.machine import runtime
from lib.machine.device import DTYPES, device_problem, pick_device
from lib.text import dataset as datasets
from lib.text import encodings, read_text
from lib.text.tokenizer import describe_mismatch
from lib.training import log
from lib.weights.load_model import cast_matrices, load_model

# model
init_from = 'resume'  # resume (OUT_DIR/ckpt.pt) | gpt2 ... gpt2-xl | a run's folder or one with GPT-2 weights
out_dir = 'out'  # folder of the training run, relative to the working directory

# what to measure on
dataset = ''  # folder under data/; '' = the checkpoint's training dataset, openwebtext for GPT-2
split = 'val'  # val | train
text = ''  # a text file instead of a dataset, line ends included; '' = none
encoding = 'utf-8'  # of the text file, for example gb18030
stride = 0  # tokens between the starts of windows, 1 to block_size; 0 = block_size
task = ''  # hellaswag | lambada; '' = none
input = ''  # the task's JSON lines in a local file; '' = download them to data/TASK/
limit = 0  # items of the task, from its beginning; 0 = all
samples = 0  # generate this many texts of 500 tokens; report how much is copied from the training split; 0 = off

# machine
batch_size = 8  # windows, or texts of a task, per batch; lower it if memory is short
device = 'auto'  # cpu | cuda | cuda:1 | mps; auto = the best available
dtype = 'auto'  # of the arithmetic: float32 | bfloat16 | float16; auto = the fastest safe one
compile = False  # torch.compile; worth it for long texts only


def check(s):
    """Return a list of error messages for the Settings `s`."""
    rules = {
        'split': (s['split'] in ('train', 'val'), 'train or val'),
        'stride': (s['stride'] >= 0, '0 (block_size) or more'),
        'task': (s['task'] in ('', *tasks.URL), f'one of {", ".join(tasks.URL)}'),
        'samples': (s['samples'] >= 0, '0 (off) or more'),
        'limit': (s['limit'] >= 0, '0 (all) or more'),
        'batch_size': (s['batch_size'] >= 1, 'at least 1'),
        'dtype': (s['dtype'] in ('auto', *DTYPES), f'one of {", ".join(runtime.DTYPES)}'),
    }
    found = [f'{name} must be {wanted}, got {s[name]!r}' for name, (fine, wanted) in rules.items() if not fine]
    found += encodings.problems(s['encoding'])
    found += [f'{name}={s[name]}: there is no such file' for name in ('text', 'input')
              if s[name] and (not find_path(s[name]).exists() or find_path(s[name]).is_dir())]
    if sum(bool(s[name]) for name in ('dataset', 'text', 'task')) > 1:
        found.append('dataset, text and task exclude each other; give one')
    if s['samples'] and (s['text'] or s['task']):
        found.append('samples are compared with a dataset; leave text and task out')
    if problem := device_problem(s['device']):
        found.append(problem)
    return found


def window_batches(split, block_size, stride):
    """Yield (idx, targets) (B, T) over a datasets.Split in windows of one length; targets not to be scored are -1."""
    if split.dialogues is not None:
        batches = datasets.split_batches(split, block_size, batch_size)
        yield from log.progress(batches, len(batches), 'batches')
        return
    count = 1 + max(0, -(-(len(split) - 1 - block_size) // stride))
    batch = []
    for window in log.progress(datasets.sliding_windows(len(split), block_size, stride), count, 'windows'):
        if batch and (len(batch) == batch_size or window[1] != batch[0][1]):
            yield load_windows(split, batch)
            batch = []
        batch.append(window)
    if batch:
        yield load_windows(split, batch)


def load_windows(split, batch):
    """Return (idx, targets) (B, T) of windows, (start, length, n_scored) each, all of one length."""
    starts, lengths, n_scored = map(np.array, zip(*batch))
    idx, targets = split.batch(starts, int(lengths[0]))
    context_only = torch.arange(lengths[0]) < torch.tensor(lengths - n_scored)[:, None]  # (B, T)
    return idx, targets.masked_fill(context_only, -1)


@torch.inference_mode()
def split_loss(model, rt, split, block_size, stride):
    """Return the summed loss in nats over the N - 1 targets of a datasets.Split, or over those in its dialogues."""
    nats = 0.0
    for idx, targets in window_batches(split, block_size, stride):
        mean = float(model(*rt.to_device(idx, targets))[1])
        nats += mean * int((targets >= 0).sum())
    return nats


@torch.inference_mode()
def loglikelihoods(model, rt, requests):
    """Return (nats, n_tokens, is_greedy) of continuations: summed loss, length, and whether greedy decoding gives it.

    requests: (context ids, continuation ids) each. The beginning is cut off beyond block_size + 1 tokens.
    """
    results = []
    firsts = range(0, len(requests), batch_size)
    for first in log.progress(firsts, len(firsts), 'batches'):
        batch = requests[first:first + batch_size]
        texts = [(context + continuation)[-model.config.block_size - 1:] for context, continuation in batch]
        n_scored = [min(len(continuation), len(ids) - 1) for (_, continuation), ids in zip(batch, texts)]
        T = max(map(len, texts)) - 1
        idx, targets = torch.zeros(len(texts), T, dtype=torch.long), torch.full((len(texts), T), -1)  # (B, T) each
        for row, (ids, n) in enumerate(zip(texts, n_scored)):  # padded at the end, which a causal model cannot see
            idx[row, :len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, len(ids) - 1 - n:len(ids) - 1] = torch.tensor(ids[-n:])
        idx, targets = rt.to_device(idx, targets)
        scored = targets >= 0
        logits = model(idx, targets, return_logits=True)[0][scored].float()  # (scored targets of all rows, V)
        losses = F.cross_entropy(logits, targets[scored], reduction='none').split(n_scored)
        greedy = (logits.argmax(-1) == targets[scored]).split(n_scored)
        results += [(float(loss.sum()), n, bool(hit.all())) for loss, n, hit in zip(losses, n_scored, greedy)]
    return results


def run_task(model, tok, rt):
    """Return the line with the model's results on `task`."""
    items = tasks.read(task, find_path(input) if input else None, limit)
    found = tasks.scores(task, items, loglikelihoods(model, rt, tasks.requests(task, items, tok)))
    values = ', '.join(f'{name} {value:.4f}' for name, value in found.items())
    return f'{task}: {values} ({len(items):,} items; {tasks.RULE[task]})'


def split_of_text(tok):
    """Return the text file as a datasets.Split of the model's tokens."""
    path = find_path(text)
    content = ''.join(read_text.chunks(path, encoding))
    ids = np.array(tok.encode(content), dtype=np.uint32)
    return datasets.Split(path, ids, len(content.encode()), '', tok.vocab_size)


def open_data(tok, state, block_size):
    """Return the datasets.Dataset to measure on; UserError if its tokens are not the model's."""
    trained_on = state.get('config', {}).get('dataset', 'openwebtext')
    data = datasets.open_dataset(dataset or trained_on, block_size, any_length=True)
    if data.tokenizer != tok.spec:
        advice = 'leave --dataset out' if dataset not in ('', trained_on) else 'prepare it as for the training'
        raise UserError(f'dataset {data.name} does not fit this model: {describe_mismatch(data.tokenizer, tok.spec)}; '
                        f"{advice}, or give a text with --text=FILE, which is read with the model's tokenizer")
    return data


def split_of_dataset(tok, state, block_size):
    """Return (name, datasets.Split) of the dataset."""
    data = open_data(tok, state, block_size)
    return f'{split} of {data.name}', getattr(data, split)


def run_samples(model, tok, state):
    """Return the lines that say how much of generated text is copied from the training split (lib/novelty.py)."""
    data = open_data(tok, state, model.config.block_size)
    train, held_out = data.train.tokens, data.val.tokens
    length = min(500, len(held_out))
    tokens = generate(model, tok.start_ids, samples, length, valid_vocab=tok.vocab_size, temperature=0.8, top_k=200)
    generated = torch.stack(list(log.progress(tokens, length, 'tokens')), dim=1).cpu().numpy()  # (samples, length)
    if (generated < 0).any():
        raise UserError(f'the model computes NaN or infinity in {model.dtype}; try --dtype=float32')
    starts = np.linspace(0, len(held_out) - length, samples).astype(int)
    real = [held_out[start:start + length] for start in starts]
    return '\n'.join(novelty.report(list(generated), real, train, tok.decode))


def run_text(model, tok, rt, state):
    """Return the line with the loss on the text file or the dataset's split."""
    block_size = model.config.block_size
    if stride > block_size:
        raise UserError(f'stride={stride} would leave out tokens: the context of the model is {block_size} tokens')
    name, tokens = (text, split_of_text(tok)) if text else split_of_dataset(tok, state, block_size)
    if len(tokens) < 2:
        raise UserError(f'{name} has {len(tokens)} tokens; a loss needs at least 2')
    nats = split_loss(model, rt, tokens, block_size, stride or block_size)
    n = tokens.n_targets - (tokens.dialogues.n_lost if tokens.dialogues is not None else 0)
    line = f'{name}: loss {nats / n:.4f}, perplexity {math.exp(min(nats / n, 700)):.4f}'
    if tokens.n_bytes:
        line += f', bpb {tokens.bits_per_byte(nats / n, tokens.n_targets):.4f}'
    return f'{line} ({n:,} targets, windows of {block_size}, stride {stride or block_size})'


def main(argv=None):
    settings = configure(globals(), argv, early={'device': pick_device}, check=check)
    settings.setdefault('seed', 0)  # runtime.start wants one; nothing is random here
    rt = runtime.start(settings)
    model, tok, state = load_model(init_from, out_dir)
    model = cast_matrices(model.to(rt.device), rt.dtype)  # the other weights stay float32, as in training
    if compile:
        model = torch.compile(model)
    print(f'device: {rt.description}')
    if samples:
        print(run_samples(model.eval(), tok, state))
    else:
        print(run_task(model, tok, rt) if task else run_text(model, tok, rt, state))


if __name__ == '__main__':
    main()
