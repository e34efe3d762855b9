"""What bench.py times from within: each function runs in a process of its own and returns a dict of numbers."""
import ast
import json
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F


def machine():
    """Return what the numbers depend on."""
    cpu, info = platform.processor() or platform.machine(), Path('/proc/cpuinfo')
    if info.exists() and (line := re.search('model name\\s*: (.*)', info.read_text(encoding='utf-8'))):
        cpu = line[1]
    gpu = {'gpu': torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {'cpu': cpu, 'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
            'isa': torch.backends.cpu.get_cpu_capability(), 'torch': torch.__version__, **gpu}


def took(job):
    """Return the seconds that job() takes."""
    began = time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def per_second(job, least=2.0):
    """Return how many calls job(i) bears a second, over `least` seconds or more."""
    job(0)
    began, n = time.perf_counter(), 0
    while time.perf_counter() < began + least:
        n += 1
        job(n)
    return n / (time.perf_counter() - began)


def write_checkpoint(name, args, dataset):
    """Write a model of random weights to the folder `name`, as both programs read it; args are its GPTConfig's."""
    from lib.weights import checkpoint
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(**args))
    Path(name).mkdir()
    checkpoint.save(f'{name}/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(),
                                        'iter_num': 0, 'best_val_loss': 9.9, 'config': {'dataset': dataset}})
    return {}


def flops(sizes):
    """Return the FLOPs that each size spends on a token of training; its batch_size does not matter."""
    from model import GPT, GPTConfig
    shapes = ({key: value for key, value in size.items() if key != 'batch_size'} for size in sizes)
    return [GPT(GPTConfig(vocab_size=65, bias=False, **shape), init=False).flops_per_token() for shape in shapes]


def profile(argv, trace):
    """Run train.py, but for its final evaluation, under torch's profiler; writes the trace, returns where time went."""
    import train
    sys.argv, train.whole_losses = ['train.py', *argv], lambda *_: ([0.0, 0.0], None)
    with torch.profiler.profile() as found:
        train.main()
    found.export_chrome_trace(trace)
    key = 'self_cuda_time_total' if torch.cuda.is_available() else 'self_cpu_time_total'
    return {'table': found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40)}


def guards(sizes, batch_size):
    """Time what train.py does in each update to keep unfit ids and numbers out of the weights."""
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
    late = guard.DelayedReader(torch.device('cpu'))
    ids = split.tokens[:batch_size * sizes['block_size']].reshape(batch_size, -1)
    idx = torch.from_numpy(ids.astype('i8'))

    def step(loss, norm, guarded):
        if not guarded:
            return opt.step()
        assert ids.max() < split.vocab_size
        opt.found_inf = (~torch.isfinite(loss + norm)).float()
        opt.step()
        late(torch.stack([loss, norm, norm]))
        del opt.found_inf

    def update(_):
        opt.zero_grad(set_to_none=True)
        loss = model(idx, idx)[1]
        loss.backward()
        step(loss.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), True)

    whole, one = 1 / per_second(update), torch.ones(())
    cost = statistics.median(1 / per_second(lambda _: step(one, one, True), 0.1)
                             - 1 / per_second(lambda _: step(one, one, False), 0.1) for _ in range(20))
    return {'us an update': 1e6 * cost, 'share of an update, %': 100 * cost / whole}


def batches(side, vs, batch_size, block_size):
    """Time how quickly batches come; nanoGPT's function is taken out of its train.py, which trains when imported."""
    import numpy as np
    if side == 'ours':
        from lib.text import dataset
        split = dataset.open_dataset('bench_char', block_size).train
        return {'batches/s': per_second(lambda i: split.batch(dataset.train_starts(
            'epochs', 1337, len(split), block_size, i * batch_size, batch_size), block_size))}
    parsed = ast.parse((Path(vs) / 'train.py').read_text(encoding='utf-8'))
    parsed.body = [node for node in parsed.body if getattr(node, 'name', '') == 'get_batch']
    scope = dict(np=np, torch=torch, os=os, data_dir='data/bench_char', batch_size=batch_size, block_size=block_size,
                 device='cpu', device_type='cpu')
    exec(compile(parsed, 'train.py', 'exec'), scope)
    return {'batches/s': per_second(lambda _: scope['get_batch']('train'))}


def reading(device):
    """Time how quickly memory is read: a sum over 1 GiB, more than any cache holds."""
    memory = torch.ones(2**28, device=device)
    return {'bytes/s': 2**30 * max(per_second(lambda _: float(memory.sum()), 0.5) for _ in range(5))}


def generating(side, vs, device, dtype, prompt, new):
    """Time one sequence of a 124M model of random weights: tokens written, or tokens read where new is 1."""
    torch.manual_seed(0)
    idx, rules = torch.randint(50257, (1, prompt), device=device), dict(temperature=0.8, top_k=200)
    if side == 'transformers':
        from transformers import GPT2Config, GPT2LMHeadModel
        model = GPT2LMHeadModel(GPT2Config())
        rules.update(attention_mask=torch.ones_like(idx), do_sample=True, pad_token_id=0)

        def write(n):
            model.generate(idx, min_new_tokens=n, max_new_tokens=n, **rules)
    else:
        if side == 'nanoGPT':
            sys.path.insert(0, vs)
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(1024, 50257))

        def write(n):
            if side == 'nanoGPT':
                model.generate(idx, n, **rules)
            else:
                list(generate(model, idx[0].tolist(), 1, n, **rules))
    if side == 'ours':
        from lib.generate import generate
        from lib.machine import runtime
        runtime.tune_malloc()
    model = model.eval().to(device, getattr(torch, dtype))
    with torch.inference_mode():
        write(min(2, new))
        return {'tokens/s': (new if new > 1 else prompt) / took(lambda: write(new))}


def sliding(out_dir, home, device, keep):
    """Measure what keeping a share of a full context costs, against reading the whole window anew at every token.

    Nats: means over the same 4000 tokens of the validation text. After a slide contexts grow from the kept length to
    the whole, so tokens are predicted after each of these lengths in turn, and all of them after the whole.
    """
    from lib import generate
    from lib.text import dataset
    from lib.weights.load_model import load_model
    os.chdir(home)
    model, _, state = load_model('resume', out_dir)
    model, generate.KEEP = model.to(device), keep
    val, T = dataset.open_dataset(state['config']['dataset'], 1).val, model.config.block_size
    targets = torch.linspace(T, len(val) - T - 1, min(4000, len(val) - 2 * T)).long()

    @torch.inference_mode()
    def nats(lengths):
        found = []
        for at, length in zip(targets.split(32), lengths.split(32)):
            idx, after = (t.to(device) for t in val.batch((at - length).numpy(), T))  # (B, T) each
            last = torch.arange(len(at)), length - 1
            found.append(F.cross_entropy(model(idx, after)[0][last].float(), after[last], reduction='none').cpu())
        return torch.cat(found)

    def speed(samples, new):
        def write():
            return list(generate.generate(model, [0], samples, new, temperature=0.8, top_k=200))
        return samples * new / took(write)

    kept = max(1, int(keep * T))
    slid, whole = nats(kept + torch.arange(len(targets)) % (T - kept + 1)), nats(torch.full_like(targets, T))
    speed(10, 8)
    return {'context': T, 'nats': float(slid.mean()), 'nats lost': float((slid - whole).mean()),
            'its standard error': float((slid - whole).std() / len(whole)**0.5),
            'tokens/s, one sample': speed(1, 4 * T), 'tokens/s, ten samples': speed(10, 4 * T)}


def write_corpus(name, million):
    """Write so many MB of the standard library's paragraphs, as NAME.txt and as documents in NAME.jsonl."""
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
    """Time GPT-2's BPE alone, in one thread, on texts that are in memory."""
    import tiktoken
    coder = tiktoken.get_encoding('gpt2')
    texts = [json.loads(line)['text'] for line in open(f'{name}.jsonl', encoding='utf-8')]
    return {'MB/s': sum(map(len, texts)) / 1e6 / took(lambda: [coder.encode_ordinary(text) for text in texts])}


def storing(side):
    """Time saving and loading a training state of 124M parameters; the bare way is torch.save, fsync and torch.load."""
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

    if side == 'ours':
        out = {'s to save': took(lambda: checkpoint.save('state.pt', state)),
               's to load': took(lambda: checkpoint.load('state.pt'))}
    else:
        out = {'s to save': took(save), 's to load': took(lambda: torch.load('state.pt', weights_only=True))}
    out['MiB of the file'] = os.path.getsize('state.pt') / 2**20
    os.remove('state.pt')
    return out
