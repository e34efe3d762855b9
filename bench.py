"""Measure speed and memory; with --vs=FOLDER, a checkout of nanoGPT, those of both programs in turns.

    python bench.py                                                       the quick rows
    python bench.py --rows=list                                           the names of all rows
    python bench.py --rows=train_small,sample_small --vs=../nanoGPT --json=docs/bench.json
    python bench.py --rows=slide --out_dir=out-shakespeare-char           what a sliding context costs this model
    python bench.py --rows=train_baby --profile                           where an update's time goes, and a trace

Each measurement is a process of its own, and the sides of a row take turns: a number is the median over the turns,
with the lowest and the highest. Where there is a command to do it, that command is what runs, on random tokens and
weights; its updates are timed by the lines that it prints. What is timed from within is in benchmarks/workloads.py.
"""
import array
import contextlib
import importlib.util
import math
import os
import pickle
import random
import runpy
import shlex
import shutil
import statistics
import sys
import tempfile
from fractions import Fraction
from functools import partial
from pathlib import Path

from benchmarks.harness import add, inside, summary, table, watch
from configurator import REPO, UserError, configure

rows = 'train_small,sample_small,batches'  # rows to measure, with commas between; 'all', or 'list' to see them
vs = ''  # folder of a nanoGPT checkout to compare with; '' none
turns = 3  # measurements of each side of a row; slow rows take fewer
seconds = 10.0  # of updates in a turn, beyond the first two
json = ''  # file to which the rows are added, or whose rows they replace; '' none
label = ''  # behind the names of the rows there, for the same row on another model or machine
device = 'cpu'  # cpu | cuda
more = ''  # further arguments of our commands, in one word, e.g. --more=--dtype=float32
out_dir = 'out'  # row slide: folder of the training run whose model slides
profile = False  # of the training rows, the operations and a trace instead of the time

HOME = Path.cwd()  # where the user is; everything runs in a scratch folder

SMALL = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0)  # nanoGPT's CPU recipe, 0.8M
BABY = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2)  # its baby GPT, 10.65M
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=256, batch_size=4, dropout=0.0)  # 124M, short of memory
WORDY = {**SMALL, 'block_size': 256, 'batch_size': 16, 'dataset': 'bench_gpt2'}  # GPT-2's vocabulary, 6.4M of 7.2M
LONG = {**GPT2, 'block_size': 1024, 'batch_size': 16}  # 124M as it is trained on a GPU


def program(side, script, *flags):
    """Return the command that runs a script of ours or of nanoGPT's on the device."""
    if side != 'nanoGPT':
        return [sys.executable, REPO / script, *flags, f'--device={device}', *more.split()]
    fits = ['--dtype=float32', '--compile=False'] if device == 'cpu' else ['--dtype=bfloat16']
    return [sys.executable, HOME / vs / script, *flags, f'--device={device}', *fits]


def stage():
    """Fill the scratch folder: random tokens in nanoGPT's format, and what its scripts look for where they run."""
    rng = random.Random(0)
    for name, vocab_size in (('bench_char', 65), ('bench_gpt2', 50257)):
        (folder := Path('data', name)).mkdir(parents=True)
        for split in ('train', 'val'):
            ids = array.array('H', rng.choices(range(vocab_size), k=40_000))
            (folder / f'{split}.bin').write_bytes(ids.tobytes())
    chars = '\n' + ''.join(map(chr, range(33, 97)))
    meta = {'vocab_size': 65, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    Path('data/bench_char/meta.pkl').write_bytes(pickle.dumps(meta))
    for name in ('configurator.py', 'config') if vs else ():
        os.symlink(HOME / vs / name, name)


def tokens_for(size):
    return size.get('dataset') or ('bench_gpt2' if size['n_embd'] == 768 else 'bench_char')


def checkpoint_for(size):
    """Return a folder with a model of this size and random weights; GPT-2's with all its positions and biases."""
    gpt2 = {'block_size': 1024, 'vocab_size': 50257} if size is GPT2 else {'vocab_size': 65, 'bias': False}
    name = f'model-{size["n_layer"]}x{size["n_embd"]}'
    if not Path(name).exists():
        args = {k: v for k, v in size.items() if k != 'batch_size'} | gpt2
        inside('write_checkpoint', name, args, tokens_for(size))
    return name


def gpt2_folder():
    """Return a folder in Hugging Face's layout with random weights; `gpt2` itself would be the hub's to us."""
    if not Path('gpt2').exists():
        watch([sys.executable, REPO / 'export.py', f'--out_dir={checkpoint_for(GPT2)}', '--to=gpt2'])
    return './gpt2'


# Each row's function takes the side to measure, last, and returns {quantity: number}.

def training_flags(size):
    flags = {**size, 'dataset': tokens_for(size), 'gradient_accumulation_steps': 1, 'learning_rate': 1e-3,
             'warmup_iters': 100, 'max_iters': 1_000_000, 'eval_interval': 1_000_000, 'eval_iters': 1,
             'log_interval': 1, 'out_dir': 'trained'}
    return [f'--{name}={value}' for name, value in flags.items()]


def training(size, side, *first):
    """Run train.py until updates took `seconds`."""
    found, _, peak = watch(program(side, 'train.py', *first, *training_flags(size)),
                           r'^iter \d+: .* time ([\d.]+)ms(?:, mfu ([\d.]+)%)?',
                           lambda found: len(found) > 3 and found[-1][0] - found[1][0] >= seconds)
    shutil.rmtree('trained')
    ms = statistics.median(float(match[1]) for _, match in found[2:])
    mfu = [float(match[2]) for _, match in found[2:] if match[2] and side != 'nanoGPT']  # its share is an A100's
    return {'ms an update': ms, 'tokens/s': 1000 / ms * size['batch_size'] * size['block_size'],
            **({'MFU, %': statistics.median(mfu)} if mfu else {}),
            's from command to first update': found[0][0], 'MiB at peak': peak}


def recipe_size():
    config = runpy.run_path(str(REPO / 'config/train_shakespeare_char.py'), {'device': device})
    return {name: config[name] for name in SMALL}


def training_recipe(side):
    """Flags that repeat the config's own sizes change nothing; those of a longer run switch off its clock."""
    return training(recipe_size(), side, 'config/train_shakespeare_char.py')


def finetuning(side):
    """All of GPT-2 124M, or so that it takes less memory."""
    how = {'LoRA of rank 8': ['--lora_rank=8'], 'recomputing activations': ['--checkpoint_activations']}
    found = training(GPT2, side, f'--init_from={gpt2_folder()}', '--bias=True', *how.get(side, []))
    found.pop('MFU, %', None)  # counts the gradients of all weights
    return found


def exponent(sizes, values):
    """Return the slope of log(values) over log(sizes)."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(v) for v in values]).slope


def growth(side):
    """Fit exponents: time a token as one size doubles three times, beside that of the FLOPs; memory with the corpus."""
    base, out = {**SMALL, 'n_embd': 256, 'block_size': 128}, {}
    for name, what in (('n_layer', 'layers'), ('n_embd', 'width'), ('block_size', 'context')):
        sizes = [base[name] * 2**i for i in range(4)]
        shapes = [{**base, name: size} for size in sizes]
        shapes = [{**shape, 'batch_size': 2048 // shape['block_size']} for shape in shapes]
        us = [1e6 / training(shape, side)['tokens/s'] for shape in shapes]
        out |= {f'exponent of time a token in {what}': exponent(sizes, us),
                f'exponent of FLOPs a token in {what}': exponent(sizes, inside('flops', shapes))}
        out |= {f'us a token, {what} {size}': each for size, each in zip(sizes, us)}
    memory = preparing_memory((2, 20, 200), side)
    return out | {'exponent of memory in text': exponent((2, 20, 200), memory.values())} | memory


def sampling(size, num_samples, max_new_tokens, side):
    """The whole command; how long importing torch takes is measured beside it."""
    imported = watch([sys.executable, '-c', 'import torch'])[1]
    _, took, peak = watch(program(side, 'sample.py', f'--out_dir={checkpoint_for(size)}',
                                  f'--num_samples={num_samples}', f'--max_new_tokens={max_new_tokens}'))
    return {'s, whole command': took, 's without importing torch': took - imported, 'MiB at peak': peak}


def first_token(side):
    """From the command to the first token of GPT-2 in a folder."""
    name = 'gpt2' if side == 'nanoGPT' else './gpt2'
    gpt2_folder()
    _, took, peak = watch(program(side, 'sample.py', f'--init_from={name}', '--num_samples=1', '--max_new_tokens=1',
                                  '--start=Hello'), env={'HF_HUB_OFFLINE': '1'})
    return {'s, whole command': took, 'MiB at peak': peak}


def generating(dtype, prompt, new, side):
    """One sequence of 124M. The limit: each token reads all weights but the table of positions once."""
    if side == 'reading the weights':
        return {'tokens/s': inside('reading', device)['bytes/s'] / 123_653_376 / (4 if dtype == 'float32' else 2)}
    its = 'float32' if side == 'nanoGPT' and device == 'cpu' else dtype  # all that it can on a CPU
    return inside('generating', side, str(HOME / vs), device, its, prompt, new)


def batches(side):
    return inside('batches', side, str(HOME / vs), BABY['batch_size'], BABY['block_size'])


def guards(side):
    return inside('guards', {k: v for k, v in SMALL.items() if k != 'batch_size'}, SMALL['batch_size'])


def storing(side):
    return inside('storing', side)


def slide(side):
    """The side is the share of a full context that stays; 1 reads the whole window anew at every token."""
    return inside('sliding', str(HOME / out_dir), str(HOME), device, float(Fraction(side)))


def preparing(tokenizer, million, side):
    """From a file to .bin, the whole command: many short documents, but for characters a single text."""
    name, peer = f'corpus-{million}', Path('peer')
    size = inside('write_corpus', name, million)['MB']
    if side == 'tiktoken in one thread':
        return inside('tiktoken', name)
    text, env = f'{name}.{"txt" if tokenizer == "char" else "jsonl"}', {}
    shutil.rmtree(peer, ignore_errors=True)
    peer.mkdir()
    if side == 'ours':
        code = f'import sys; sys.path.insert(0, {str(REPO)!r}); from lib.text.prepare import prepare; prepare("peer/_")'
        command = [sys.executable, '-c', code, f'--input={text}', f'--tokenizer={tokenizer}']
    elif tokenizer == 'char':
        shutil.copy(HOME / vs / 'data/shakespeare_char/prepare.py', peer)
        shutil.copy(text, peer / 'input.txt')
        command = [sys.executable, peer / 'prepare.py']
    else:  # as it prepares OpenWebText, on the cores there are; so small a validation split has no 1024 parts
        script = (HOME / vs / 'data/openwebtext/prepare.py').read_text(encoding='utf-8')
        script = script.replace('num_proc = 8', f'num_proc = {os.cpu_count()}').replace(' = 1024', ' = 16')
        (peer / 'prepare.py').write_text(script, encoding='utf-8')
        code = ('import datasets, runpy; load = datasets.load_dataset; datasets.load_dataset = lambda *_, **__: '
                f'load("json", data_files={text!r}); runpy.run_path("peer/prepare.py", run_name="__main__")')
        command, env = [sys.executable, '-c', code], {'HF_HOME': str(peer.absolute() / 'cache')}
    _, took, peak = watch(command, env=env)
    return {'MB/s': size / took, 'MiB at peak': peak}


def preparing_memory(sizes, side):
    """Peak memory of preparing so many million bytes of text."""
    return {f'MiB at peak, {million} MB of text': preparing('gpt2', million, side)['MiB at peak'] for million in sizes}


PAIR, OURS = ('ours', 'nanoGPT'), ('ours',)
ROWS = {  # name: (what, function, sides, at most so many turns)
    'train_small': ('training 0.8M, 12 x 64', partial(training, SMALL), PAIR, 9),
    'train_baby': ('training 10.65M, 64 x 256, dropout 0.2', partial(training, BABY), PAIR, 2),
    'train_124m': ('training 124M, 4 x 256', partial(training, GPT2), PAIR, 2),
    'train_124m_long': ('training 124M, 16 x 1024', partial(training, LONG), PAIR, 3),
    'train_wordy': ("training 4 x 128 with GPT-2's vocabulary, 16 x 256", partial(training, WORDY), PAIR, 1),
    'train_recipe': ('training config/train_shakespeare_char.py', training_recipe, OURS, 9),
    'finetune': ('fine-tuning GPT-2 124M, 4 x 256', finetuning, ('ours', 'LoRA of rank 8', 'recomputing activations'),
                 1),
    'sample_small': ('sampling 0.8M, 10 x 500 tokens', partial(sampling, SMALL, 10, 500), PAIR, 9),
    'sample_baby': ('sampling 10.65M, 10 x 500 tokens', partial(sampling, BABY, 10, 500), PAIR, 1),
    'first_char': ('command to first token, 0.8M', partial(sampling, SMALL, 1, 1), PAIR, 9),
    'first_gpt2': ('command to first token, GPT-2 124M', first_token, PAIR, 9),
    'generate_fp32': ('writing 100 tokens, 124M, float32', partial(generating, 'float32', 1, 100),
                      (*PAIR, 'transformers', 'reading the weights'), 9),
    'generate_bf16': ('writing 100 tokens, 124M, bfloat16', partial(generating, 'bfloat16', 1, 100),
                      (*PAIR, 'transformers', 'reading the weights'), 9),
    'prefill': ('reading 1000 tokens, 124M, float32', partial(generating, 'float32', 1000, 1),
                (*PAIR, 'transformers'), 9),
    'batches': ('batches of 64 x 256', batches, PAIR, 9),
    'prepare_char': ('preparing 22 MB, characters', partial(preparing, 'char', 22), PAIR, 9),
    'prepare_byte': ('preparing 22 MB, bytes', partial(preparing, 'byte', 22), OURS, 9),
    'prepare_gpt2': ("preparing 22 MB, GPT-2's BPE", partial(preparing, 'gpt2', 22),
                     (*PAIR, 'tiktoken in one thread'), 9),
    'prepare_bpe': ('preparing 22 MB, own BPE, with its training', partial(preparing, 'bpe', 22), OURS, 9),
    'prepare_memory': ("preparing 50 and 500 MB, GPT-2's BPE", partial(preparing_memory, (50, 500)), OURS, 1),
    'checkpoint': ('checkpoint of 124M', storing, ('ours', 'bare torch'), 9),
    'guards': ('guards of an update, 0.8M', guards, OURS, 9),
    'growth': ('growth from 4 layers x 256, context 128', growth, OURS, 1),
    'slide': ('sliding context', slide, ('1/2', '3/4', '7/8', '1'), 1),
}


def names():
    return list(ROWS) if rows in ('all', 'list') else rows.split(',')


def check(s):
    """Return what is wrong with the Settings `s`, a line each."""
    asked = [] if s['rows'] in ('all', 'list') else s['rows'].split(',')
    found = [f'rows: there is no {name}; there are {", ".join(ROWS)}' for name in asked if name not in ROWS]
    if s['vs'] and not Path(s['vs'], 'model.py').is_file():
        found.append(f'vs={s["vs"]}: there is no model.py; name the folder of a nanoGPT checkout')
    if s['turns'] < 1:
        found.append(f'turns must be at least 1, got {s["turns"]}')
    return found


def measure(name):
    """Return what is kept of a row: its numbers, the command and the time they took."""
    what, function, sides, most = ROWS[name]
    sides = [side for side in sides if (side != 'nanoGPT' or vs)
             and (side != 'transformers' or importlib.util.find_spec('transformers'))]
    found = {side: [] for side in sides}
    for turn in range(min(turns, most)):
        for side in sides:
            found[side].append(function(side))
            print(f'{name}, turn {turn + 1}, {side}: {found[side][-1]}', file=sys.stderr, flush=True)
    return {'what': what + label.replace('-', ' '), 'command': shlex.join(['python', 'bench.py', *sys.argv[1:]]),
            'sides': {side: {unit: summary([turn[unit] for turn in each]) for unit in each[0]}
                      for side, each in found.items()}}


def main():
    configure(globals(), check=check)
    if rows == 'list':
        print('\n'.join(f'{name:<16} {what} ({", ".join(sides)})' for name, (what, _, sides, _) in ROWS.items()))
        return
    found = {}
    with tempfile.TemporaryDirectory(prefix='bench-') as scratch, contextlib.chdir(scratch):
        stage()
        about = inside('machine')
        print(', '.join(f'{key} {value}' for key, value in about.items()))
        for name in names():
            if profile:
                if not name.startswith('train'):
                    raise UserError(f'profile is for the training rows; {name} is none')
                size = ROWS[name][1].args[0] if name != 'train_recipe' else recipe_size()
                config = ['config/train_shakespeare_char.py'] * (name == 'train_recipe')
                trace = HOME / f'trace-{name}.json'
                argv = [*config, *training_flags(size), '--max_iters=20', f'--device={device}', *more.split()]
                print(inside('profile', argv, str(trace))['table'])
                print(f'{name}: the trace is in {trace}; open it at https://ui.perfetto.dev')
                continue
            found[name + label] = {**measure(name), 'machine': about}
            if json:
                add(HOME / json, {name + label: found[name + label]})
    if found:
        print('\n'.join(table(found)))


if __name__ == '__main__':
    main()
