"""The measurements of bench.py that are not whole commands. Each function runs in a new process; it returns numbers."""
import ast
import json
import os
import platform
import re
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import REPO


def machine():
    """Return the processor, its number of cores, the GPU and torch's version: what results depend on."""
    cpu, info = platform.processor() or platform.machine(), Path('/proc/cpuinfo')
    if info.exists() and (line := re.search('model name\\s*: (.*)', info.read_text(encoding='utf-8'))):
        cpu = line[1]
    gpu = {'gpu': torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {'cpu': cpu, 'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
            'isa': torch.backends.cpu.get_cpu_capability(), 'torch': torch.__version__, **gpu}


def timed(job):
    """Return the seconds that job() takes."""
    began = time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def per_second(job, least=2.0):
    """Return the number of calls of job(i) per second, measured over at least `least` seconds."""
    job(0)
    began, n = time.perf_counter(), 0
    while time.perf_counter() < began + least:
        n += 1
        job(n)
    return n / (time.perf_counter() - began)


def write_checkpoint(name, args, dataset):
    """Write a model with random weights to the folder `name`, for both programs; args: the fields of its GPTConfig."""
    from lib.weights import checkpoint
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(**args))
    Path(name).mkdir()
    checkpoint.save(f'{name}/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(),
                                        'iter_num': 0, 'best_val_loss': 9.9, 'config': {'dataset': dataset}})
    return {}


def flops(sizes):
    """Return the FLOPs per token of training for each size; its batch_size does not matter."""
    from model import GPT, GPTConfig
    shapes = ({key: value for key, value in size.items() if key != 'batch_size'} for size in sizes)
    return [GPT(GPTConfig(vocab_size=65, bias=False, **shape), init=False).flops_per_token() for shape in shapes]


def profile(argv, trace):
    """Run train.py under torch's profiler; writes the trace and returns a table of where the time went."""
    sys.argv = ['train.py', *argv]
    with torch.profiler.profile() as found:
        runpy.run_path(str(REPO / 'train.py'), run_name='__main__')
    found.export_chrome_trace(trace)
    key = 'self_cuda_time_total' if torch.cuda.is_available() else 'self_cpu_time_total'
    return {'table': found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40)}


def guards(sizes, batch_size):
    """Time the guard that keeps non-finite updates out of the weights, and compare it with a whole update."""
    from lib.machine import device, runtime
    from lib.text import dataset
    from lib.training import guard, optim
    from model import GPT, GPTConfig
    runtime.tune_malloc()
    model = GPT(GPTConfig(vocab_size=65, bias=False, **sizes))
    if device.native_bf16():
        model.set_compute_dtype(torch.bfloat16)
    opt = optim.make_optimizer('adamw', model.param_groups(0.1), 1e-3, 0.02, (0.9, 0.99), 'cpu')
    split = dataset.open_dataset('bench_char', sizes['block_size']).train
    rt = runtime.Runtime(torch.device('cpu'), torch.float32, False, '')
    guarded = guard.Guard(rt, torch.amp.GradScaler('cpu', enabled=False), 'out', 0)
    ids = split.tokens[:batch_size * sizes['block_size']].reshape(batch_size, -1)
    idx = torch.from_numpy(ids.astype('i8'))

    def step(loss, grad_norm):
        guarded.allows(opt, loss, grad_norm)
        opt.step()
        guarded.check(0)

    def update(_):
        opt.zero_grad(set_to_none=True)
        _, loss = model(idx, idx)
        loss.backward()
        step(loss.detach(), optim.clip_grad_norm_(model.parameters(), 1.0))

    update_seconds, one = 1 / per_second(update), torch.ones(())
    costs = []
    for _ in range(20):
        with_guard = 1 / per_second(lambda _: step(one, one), 0.1)
        del opt.found_inf
        costs.append(with_guard - 1 / per_second(lambda _: opt.step(), 0.1))
    cost = statistics.median(costs)
    return {'us per update': 1e6 * cost, '% of an update': 100 * cost / update_seconds}

def batches(program, vs, batch_size, block_size):
    """Time the loading of batches. nanoGPT's function is cut out of its train.py, which trains when imported."""
    import numpy as np
    if program == 'ours':
        from lib.text import dataset
        split = dataset.open_dataset('bench_char', block_size).train
        return {'batches/s': per_second(lambda i: split.batch(dataset.train_starts(
            1337, len(split), block_size, i * batch_size, batch_size), block_size))}
    parsed = ast.parse((Path(vs) / 'train.py').read_text(encoding='utf-8'))
    parsed.body = [node for node in parsed.body if getattr(node, 'name', '') == 'get_batch']
    scope = dict(np=np, torch=torch, os=os, data_dir='data/bench_char', batch_size=batch_size, block_size=block_size,
                 device='cpu', device_type='cpu')
    exec(compile(parsed, 'train.py', 'exec'), scope)
    return {'batches/s': per_second(lambda _: scope['get_batch']('train'))}


def reading(device):
    """Time the reading of memory: a sum over 1 GiB, more than any cache holds."""
    memory = torch.ones(2**28, device=device)
    return {'bytes/s': 2**30 * max(per_second(lambda _: float(memory.sum()), 0.5) for _ in range(5))}


def generating(program, vs, device, dtype, prompt, new):
    """Time one sequence of a 124M model with random weights: tokens generated, or the prompt's tokens if new is 1."""
    torch.manual_seed(0)
    idx, rules = torch.randint(50257, (1, prompt), device=device), dict(temperature=0.8, top_k=200)
    if program == 'transformers':
        from transformers import GPT2Config, GPT2LMHeadModel
        model = GPT2LMHeadModel(GPT2Config())
        rules.update(attention_mask=torch.ones_like(idx), do_sample=True, pad_token_id=0)

        def write(n):
            model.generate(idx, min_new_tokens=n, max_new_tokens=n, **rules)
    else:
        if program == 'nanoGPT':
            sys.path.insert(0, vs)
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(1024, 50257))

        def write(n):
            if program == 'nanoGPT':
                model.generate(idx, n, **rules)
            else:
                list(generate(model, idx[0].tolist(), 1, n, **rules))
    if program == 'ours':
        from lib.generate import generate
        from lib.machine import runtime
        runtime.tune_malloc()
    if dtype == 'int8':
        from lib.weights.load_model import model_from_checkpoint
        state = {'model': model.state_dict(), 'model_args': model.config.model_args()}
        model = model_from_checkpoint(state, 'random weights', torch.int8)
    else:
        model = model.to(device, getattr(torch, dtype))
    model.eval()
    with torch.inference_mode():
        write(min(2, new))
        return {'tokens/s': (new if new > 1 else prompt) / timed(lambda: write(new))}


def sliding(out_dir, home, device, keep):
    """Measure the cost of keeping a fraction of a full context, against reading the whole window again at every token.

    Nats are means over the same 4000 tokens of the validation text. After a slide the context grows from the kept
    length to the full one, so each token is predicted from one of these lengths, and all of them from the full one.
    """
    from lib import generate
    from lib.text import dataset
    from lib.weights.load_model import load_model
    os.chdir(home)
    model, _, state = load_model('resume', out_dir)
    model, generate.KEEP_ON_SLIDE = model.to(device), keep
    val, T = dataset.open_dataset(state['config']['dataset'], 1).val, model.config.block_size
    targets = torch.linspace(T, len(val) - T - 1, min(4000, len(val) - 2 * T)).long()

    @torch.inference_mode()
    def nats(lengths):
        found = []
        for at, length in zip(targets.split(32), lengths.split(32)):
            idx, after = (t.to(device) for t in val.batch((at - length).numpy(), T))  # (B, T) each
            last = torch.arange(len(at)), length - 1
            logits = model(idx, after, return_logits=True)[0][last].float()
            found.append(F.cross_entropy(logits, after[last], reduction='none').cpu())
        return torch.cat(found)

    def speed(samples, new):
        def write():
            return list(generate.generate(model, [0], samples, new, temperature=0.8, top_k=200))
        return samples * new / timed(write)

    kept = max(1, int(keep * T))
    slid, whole = nats(kept + torch.arange(len(targets)) % (T - kept + 1)), nats(torch.full_like(targets, T))
    speed(10, 8)
    return {'context': T, 'nats': float(slid.mean()), 'nats lost': float((slid - whole).mean()),
            'its standard error': float((slid - whole).std() / len(whole)**0.5),
            'tokens/s, one sample': speed(1, 4 * T), 'tokens/s, ten samples': speed(10, 4 * T)}


def write_corpus(name, million):
    """Write `million` MB of the standard library: NAME.txt, and NAME.jsonl with one paragraph per line."""
    documents = []
    for path in sorted(Path(os.__file__).parent.glob('**/*.py')):
        text = path.read_text(encoding='utf-8', errors='replace')
        if text.isascii() and 'site-packages' not in path.parts:
            documents += [part for part in text.split('\n\n') if part.strip()]
    size, i = 0, 0
    with open(f'{name}.jsonl', 'w', encoding='utf-8') as lines, open(f'{name}.txt', 'w', encoding='utf-8') as plain:
        while size < million * 1e6:
            document = documents[i % len(documents)]
            lines.write(json.dumps({'text': document}) + '\n')
            plain.write(document + '\n\n')
            size, i = size + len(document), i + 1
    return {'MB': size / 1e6, 'documents': i}


def tiktoken(name):
    """Time GPT-2's BPE alone, in one thread, on texts in memory."""
    import tiktoken
    encoding = tiktoken.get_encoding('gpt2')
    texts = [json.loads(line)['text'] for line in open(f'{name}.jsonl', encoding='utf-8')]
    return {'MB/s': sum(map(len, texts)) / 1e6 / timed(lambda: [encoding.encode_ordinary(text) for text in texts])}


def storing(program):
    """Time saving and loading the state of a 124M run; `bare torch` is torch.save, fsync and torch.load."""
    from lib.weights import checkpoint
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(bias=False))
    moments = {i: {'exp_avg': p.detach().clone(), 'exp_avg_sq': p.detach().clone()}
               for i, p in enumerate(model.parameters())}
    state = {'model': model.state_dict(), 'optimizer': {'state': moments}, 'model_args': model.config.model_args()}

    def save():
        with open('state.pt', 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    if program == 'ours':
        out = {'s to save': timed(lambda: checkpoint.save('state.pt', state)),
               's to load': timed(lambda: checkpoint.load('state.pt'))}
    else:
        out = {'s to save': timed(save), 's to load': timed(lambda: torch.load('state.pt', weights_only=True))}
    out['MiB of the file'] = os.path.getsize('state.pt') / 2**20
    os.remove('state.pt')
    return out
