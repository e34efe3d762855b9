"""Measure speed and memory, and with --vs=FOLDER compare them with nanoGPT's in that checkout.

    python bench.py                                                       the quick rows
    python bench.py --rows=list                                           the names of all rows
    python bench.py --rows=train_small,sample_small --vs=../nanoGPT --json=docs/bench.json
    python bench.py --rows=kernels                                        operations per update and per token
    python bench.py --rows=slide --out_dir=out-shakespeare-char           the cost of a sliding context for this model
    python bench.py --rows=train_baby --profile                           where an update's time goes, and a trace

Each measurement is a new process, and the programs of a row alternate: a number is the median over the repeats, with
the lowest and the highest. Where a command does the work, that command runs, on random tokens and weights; its updates
are timed by the lines that it prints. The other measurements are in benchmarks/workloads.py.
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

from benchmarks.harness import add, commit, gpu_memory, run_and_parse, run_in_subprocess, summary, table
from configurator import REPO, configure

rows = 'train_small,sample_small,batches'  # rows to measure, separated by commas; 'all', or 'list' to see them
vs = ''  # folder of a nanoGPT checkout to compare with; '' = none
repeats = 3  # measurements of each program of a row; slow rows take fewer
seconds = 10.0  # of updates per measurement, after the first two
json = ''  # file to which the rows are added (rows of the same name are replaced); '' = none
label = ''  # added to the names of the rows in that file, for the same row on another model or machine
device = 'cpu'  # cpu | cuda
extra_args = ''  # more arguments for our commands, in one word: --extra_args=--dtype=float32
out_dir = 'out'  # row slide: folder of the training run whose model is used
profile = False  # show where the time of a training row goes, and write a trace, instead of measuring

HOME = Path.cwd()  # where the user is; everything else happens in a temporary folder

SMALL = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0)  # nanoGPT's CPU recipe, 0.8M
BABY = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2)  # its baby GPT, 10.65M
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=256, batch_size=4, dropout=0.0)  # 124M in little memory
WORDY = {**SMALL, 'block_size': 256, 'batch_size': 16, 'dataset': 'bench_gpt2'}  # GPT-2's vocabulary: 7.2M
LONG = {**GPT2, 'block_size': 1024, 'batch_size': 16}  # 124M as trained on a GPU


def command(program, script, *flags):
    """Return the command that runs a script of ours or of nanoGPT's on the device."""
    if program != 'nanoGPT':
        return [sys.executable, REPO / script, *flags, f'--device={device}', *extra_args.split()]
    fits = ['--dtype=float32', '--compile=False'] if device == 'cpu' else ['--dtype=bfloat16']
    return [sys.executable, HOME / vs / script, *flags, f'--device={device}', *fits]


def fill_scratch_folder():
    """Write random tokens in nanoGPT's format, and what its scripts look for in the working directory."""
    rng = random.Random(0)
    chars = '\n' + ''.join(map(chr, range(33, 97)))
    meta = {'vocab_size': 65, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    for name, vocab_size, n_tokens in (('bench_char', 65, 40_000), ('bench_gpt2', 50257, 40_000),
                                       ('short_char', 65, 1200), ('short_gpt2', 50257, 1200)):
        (folder := Path('data', name)).mkdir(parents=True)
        for split in ('train', 'val'):
            ids = array.array('H', rng.choices(range(vocab_size), k=n_tokens))
            (folder / f'{split}.bin').write_bytes(ids.tobytes())
        if vocab_size == 65:
            (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    for name in ('configurator.py', 'config') if vs else ():
        os.symlink(HOME / vs / name, name)


def dataset_for(size):
    return size.get('dataset') or ('bench_gpt2' if size['n_embd'] == 768 else 'bench_char')


def checkpoint_for(size):
    """Return a folder with a model of this size and random weights; GPT-2's has all its positions and biases."""
    gpt2 = {'block_size': 1024, 'vocab_size': 50257} if size is GPT2 else {'vocab_size': 65, 'bias': False}
    name = f'model-{size["n_layer"]}x{size["n_embd"]}'
    if not Path(name).exists():
        args = {k: v for k, v in size.items() if k != 'batch_size'} | gpt2
        run_in_subprocess('workloads.write_checkpoint', name, args, dataset_for(size))
    return name


def gpt2_folder():
    """Return a folder in Hugging Face's layout with random weights; the name `gpt2` would be downloaded."""
    if not Path('gpt2').exists():
        run_and_parse([sys.executable, REPO / 'export.py', f'--out_dir={checkpoint_for(GPT2)}', '--to=gpt2'])
    return './gpt2'


# Each row's function takes the program (or variant) to measure as its last argument; returns {quantity: number}.

def training_flags(size):
    flags = {**size, 'dataset': dataset_for(size), 'gradient_accumulation_steps': 1, 'learning_rate': 1e-3,
             'warmup_iters': 100, 'max_iters': 1_000_000, 'eval_interval': 1_000_000, 'eval_iters': 1,
             'log_interval': 1, 'out_dir': 'trained'}
    return [f'--{name}={value}' for name, value in flags.items()]


def training(size, program, *first):
    """Run train.py until its updates have taken `seconds`. On CUDA the memory is the GPU's, all programs together."""
    on_gpu = []  # torch keeps what it once took, so the last reading is the peak

    def enough(found):
        done = len(found) > 3 and found[-1][0] - found[1][0] >= seconds
        on_gpu.extend([gpu_memory()] if done and device == 'cuda' else [])
        return done
    found, _, peak = run_and_parse(command(program, 'train.py', *first, *training_flags(size)),
                                   r'^iter \d+: .* time ([\d.]+)ms(?:, mfu ([\d.]+)%)?', enough)
    shutil.rmtree('trained')
    given = dict(word[2:].split('=', 1) for word in extra_args.split() if '=' in word and program != 'nanoGPT')
    batch_size, block_size = (int(given.get(name, size[name])) for name in ('batch_size', 'block_size'))
    ms = statistics.median(float(match[1]) for _, match in found[2:])
    mfu = [float(match[2]) for _, match in found[2:] if match[2] and program != 'nanoGPT']  # its MFU is an A100's
    return {'ms per update': ms, 'tokens/s': 1000 / ms * batch_size * block_size,
            **({'MFU, %': statistics.median(mfu)} if mfu else {}),
            's from command to first update': found[0][0],
            **({'MiB at peak on the GPU': on_gpu[-1]} if on_gpu else {'MiB at peak': peak})}


def recipe_size():
    config = runpy.run_path(str(REPO / 'config/train_shakespeare_char.py'), {'device': device})
    return {name: config[name] for name in SMALL}


def training_recipe(program):
    """The flags repeat the config's own sizes; --max_iters switches off its time limit."""
    return training(recipe_size(), program, 'config/train_shakespeare_char.py')


def finetuning(program):
    """Fine-tune all weights of GPT-2 124M, or use less memory."""
    how = {'LoRA of rank 8': ['--lora_rank=8'], 'recomputing activations': ['--checkpoint_activations']}
    found = training(GPT2, program, f'--init_from={gpt2_folder()}', '--bias=True', *how.get(program, []))
    found.pop('MFU, %', None)  # it counts the gradients of all weights
    return found


def exponent(sizes, values):
    """Return the slope of log(values) over log(sizes)."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(v) for v in values]).slope


def growth(program):
    """Fit exponents: time and FLOPs per token while one size doubles three times; memory over the size of the text."""
    base, out = {**SMALL, 'n_embd': 256, 'block_size': 128}, {}
    for name, what in (('n_layer', 'layers'), ('n_embd', 'width'), ('block_size', 'context')):
        sizes = [base[name] * 2**i for i in range(4)]
        shapes = [{**base, name: size} for size in sizes]
        shapes = [{**shape, 'batch_size': 2048 // shape['block_size']} for shape in shapes]
        us = [1e6 / training(shape, program)['tokens/s'] for shape in shapes]
        out |= {f'exponent of time per token in {what}': exponent(sizes, us),
                f'exponent of FLOPs per token in {what}': exponent(sizes, run_in_subprocess('workloads.flops', shapes))}
        out |= {f'us per token, {what} {size}': each for size, each in zip(sizes, us)}
    memory = preparing_memory((2, 20, 200), program)
    return out | {'exponent of memory in text': exponent((2, 20, 200), memory.values())} | memory


def sampling(size, num_samples, max_new_tokens, program):
    """Run the whole command, and measure the import of torch separately."""
    import_torch = run_and_parse([sys.executable, '-c', 'import torch'])[1]
    flags = [f'--out_dir={checkpoint_for(size)}', f'--num_samples={num_samples}', f'--max_new_tokens={max_new_tokens}']
    _, elapsed, peak = run_and_parse(command(program, 'sample.py', *flags))
    return {'s, whole command': elapsed, 's without importing torch': elapsed - import_torch, 'MiB at peak': peak}


def first_token(program):
    """From the command to the first token of GPT-2 in a folder."""
    name = 'gpt2' if program == 'nanoGPT' else './gpt2'
    gpt2_folder()
    flags = [f'--init_from={name}', '--num_samples=1', '--max_new_tokens=1', '--start=Hello']
    _, elapsed, peak = run_and_parse(command(program, 'sample.py', *flags), env={'HF_HUB_OFFLINE': '1'})
    return {'s, whole command': elapsed, 'MiB at peak': peak}


def generating(dtype, prompt, new, program):
    """One sequence of 124M. The limit: each token reads all weights once, except the table of positions."""
    if program == 'reading the weights':
        n_bytes = 123_653_376 * {'float32': 4, 'bfloat16': 2, 'int8': 1}[dtype]
        return {'tokens/s': run_in_subprocess('workloads.reading', device)['bytes/s'] / n_bytes}
    if program == 'nanoGPT' and device == 'cpu':
        dtype = 'float32'  # the only one that it supports on a CPU
    return run_in_subprocess('workloads.generating', program, str(HOME / vs), device, dtype, prompt, new)


def batches(program):
    return run_in_subprocess('workloads.batches', program, str(HOME / vs), BABY['batch_size'], BABY['block_size'])


def guards(program):
    sizes = {k: v for k, v in SMALL.items() if k != 'batch_size'}
    return run_in_subprocess('workloads.guards', sizes, SMALL['batch_size'])


def storing(program):
    return run_in_subprocess('workloads.storing', program)


def slide(fraction):
    """`fraction` of a full context is kept when it slides; 1 reads the whole window again for every token."""
    return run_in_subprocess('workloads.sliding', str(HOME / out_dir), str(HOME), device, float(Fraction(fraction)))


MODELS = {'0.8M': SMALL, 'CPU recipe': {}, '10.65M': {**BABY, 'batch_size': 4}, '124M': GPT2}


def kernels(variant):
    """Count the operations of an update and of a token, which are the same on every machine."""
    model, dtype = variant.split(', ')
    data = 'short_gpt2' if model == '124M' else 'short_char'
    config = [str(REPO / 'config/train_shakespeare_char.py'), '--n_layer=4', '--n_embd=128'] * (model == 'CPU recipe')
    sizes = [f'--{name}={value}' for name, value in MODELS[model].items()]
    machine = ['--device=cpu', f'--dtype={dtype}', '--out_dir=counted']
    train = [*config, *sizes, *machine, f'--dataset={data}', '--gradient_accumulation_steps=1', '--compile=False',
             '--eval_interval=1000', '--eval_iters=1', '--log_interval=1']
    found = run_in_subprocess('operations.count', str(REPO), train, [*machine, '--num_samples=1'])
    shutil.rmtree('counted')
    return found


def preparing(tokenizer, million, program):
    """The whole command from a file to .bin: many short documents, or one text for characters."""
    name, peer = f'corpus-{million}', Path('peer')
    size = run_in_subprocess('workloads.write_corpus', name, million)['MB']
    if program == 'tiktoken in one thread':
        return run_in_subprocess('workloads.tiktoken', name)
    text, env = f'{name}.{"txt" if tokenizer == "char" else "jsonl"}', {}
    shutil.rmtree(peer, ignore_errors=True)
    peer.mkdir()
    if program == 'ours':
        code = f'import sys; sys.path.insert(0, {str(REPO)!r}); from lib.text.prepare import prepare; prepare("peer/_")'
        prepare = [sys.executable, '-c', code, f'--input={text}', f'--tokenizer={tokenizer}']
    elif tokenizer == 'char':
        shutil.copy(HOME / vs / 'data/shakespeare_char/prepare.py', peer)
        shutil.copy(text, peer / 'input.txt')
        prepare = [sys.executable, peer / 'prepare.py']
    else:  # its script for OpenWebText, on all cores; this validation split is too small for 1024 parts
        script = (HOME / vs / 'data/openwebtext/prepare.py').read_text(encoding='utf-8')
        script = script.replace('num_proc = 8', f'num_proc = {os.cpu_count()}').replace(' = 1024', ' = 16')
        (peer / 'prepare.py').write_text(script, encoding='utf-8')
        code = ('import datasets, runpy; load = datasets.load_dataset; datasets.load_dataset = lambda *_, **__: '
                f'load("json", data_files={text!r}); runpy.run_path("peer/prepare.py", run_name="__main__")')
        prepare, env = [sys.executable, '-c', code], {'HF_HOME': str(peer.absolute() / 'cache')}
    _, elapsed, peak = run_and_parse(prepare, env=env)
    return {'MB/s': size / elapsed, 'MiB at peak': peak}


def preparing_memory(sizes, program):
    """Peak memory of preparing texts of these sizes, in millions of bytes."""
    return {f'MiB at peak, {million} MB of text': preparing('gpt2', million, program)['MiB at peak']
            for million in sizes}


PAIR, OURS = ('ours', 'nanoGPT'), ('ours',)
VARIANTS = ('CPU recipe, bfloat16', 'CPU recipe, float32', '0.8M, bfloat16', '0.8M, float32', '10.65M, float32',
            '124M, float32')
ROWS = {  # name: (what, function, programs or variants, largest number of repeats)
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
    'generate_int8': ('writing 100 tokens, 124M, int8', partial(generating, 'int8', 1, 100),
                      ('ours', 'reading the weights'), 9),
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
    'kernels': ('operations', kernels, VARIANTS, 1),
    'guards': ('guards of an update, 0.8M', guards, OURS, 9),
    'growth': ('growth from 4 layers x 256, context 128', growth, OURS, 1),
    'slide': ('sliding context', slide, ('1/2', '3/4', '7/8', '1'), 1),
}


def names():
    return list(ROWS) if rows in ('all', 'list') else rows.split(',')


def check(s):
    """Return a list of error messages for the Settings `s`."""
    asked = [] if s['rows'] in ('all', 'list') else s['rows'].split(',')
    found = [f'rows: there is no {name}; there are {", ".join(ROWS)}' for name in asked if name not in ROWS]
    if s['vs'] and not Path(s['vs'], 'model.py').is_file():
        found.append(f'vs={s["vs"]}: there is no model.py; name the folder of a nanoGPT checkout')
    if s['repeats'] < 1:
        found.append(f'repeats must be at least 1, got {s["repeats"]}')
    if s['profile'] and not all(name.startswith('train') for name in asked):
        found.append('profile is for the training rows only: --rows=train_...')
    return found


def measure(name):
    """Return the entry of a row: its numbers, and the command that measured them."""
    what, function, programs, limit = ROWS[name]
    programs = [program for program in programs if (program != 'nanoGPT' or vs)
                and (program != 'transformers' or importlib.util.find_spec('transformers'))]
    found = {program: [] for program in programs}
    for repeat in range(min(repeats, limit)):
        for program in programs:
            found[program].append(function(program))
            print(f'{name}, repeat {repeat + 1}, {program}: {found[program][-1]}', file=sys.stderr, flush=True)
    return {'what': what + label.replace('-', ' '), 'command': shlex.join(['python', 'bench.py', *sys.argv[1:]]),
            'commit': commit(),
            'sides': {program: {quantity: summary([numbers[quantity] for numbers in each]) for quantity in each[0]}
                      for program, each in found.items()}}


def show_profile(name):
    """Print where the time of a training row goes, and write a trace. It includes two short evaluations."""
    size, config = ROWS[name][1].args[0] if name != 'train_recipe' else recipe_size(), []
    if name == 'train_recipe':
        config = [str(REPO / 'config/train_shakespeare_char.py')]
    trace = HOME / f'trace-{name}.json'
    argv = [*config, *training_flags(size), f'--dataset={dataset_for(size).replace("bench", "short")}',
            '--max_iters=20', f'--device={device}', *extra_args.split()]
    print(run_in_subprocess('workloads.profile', argv, str(trace))['table'])
    print(f'{name}: the trace is in {trace}; open it at https://ui.perfetto.dev')


def main():
    configure(globals(), check=check)
    if rows == 'list':
        for name, (what, _, programs, _) in ROWS.items():
            print(f'{name:<16} {what} ({", ".join(programs)})')
        return
    found = {}
    with tempfile.TemporaryDirectory(prefix='bench-') as scratch, contextlib.chdir(scratch):
        fill_scratch_folder()
        machine = run_in_subprocess('workloads.machine')
        print(', '.join(f'{key} {value}' for key, value in machine.items()))
        for name in names():
            if profile:
                show_profile(name)
                continue
            found[name + label] = {**measure(name), 'machine': machine}
            if json:
                add(HOME / json, {name + label: found[name + label]})
    if found:
        print('\n'.join(table(found)))


if __name__ == '__main__':
    main()
