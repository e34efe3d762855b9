"""What a training run will take: parameters, FLOPs, memory, time, epochs, checkpoint bytes. Nothing is trained here.

A Job is worked out from the settings of train.py; the other functions are arithmetic on it. plan.py prints a page of
it, and train.py one line.
"""
from dataclasses import dataclass, fields, replace

import torch

from lib.training.footprint import footprint
from lib.training.log import duration, human_number
from lib.weights import checkpoint, gpt2
from model import GPT, GPTConfig

CHINCHILLA = 20  # tokens per parameter for the lowest loss at a number of FLOPs (Hoffmann et al. 2022, 2203.15556)
LARGE = 50e6  # parameters; a few minutes are no use for more
REPEATS = 4  # epochs that are nearly as good as new text (Muennighoff et al. 2023, arXiv:2305.16264)
CUDA_CONTEXT = 0.8e9  # bytes that CUDA, cuBLAS and loaded kernels take; about
USABLE = 0.92  # fraction of a GPU's memory that tensors can fill before fragments are in the way


@dataclass
class Job:
    """A training run, as far as its cost goes. Counts per update are over all ranks together."""
    config: GPTConfig
    batch_size: int
    micro_steps: int
    max_iters: int  # 0 if max_minutes ends the run
    max_minutes: float
    contexts: list  # [(fraction of the run, context length)]
    eval_interval: int
    eval_iters: int
    optimizer: str
    lora_rank: int
    checkpoint_activations: bool
    parallel: str
    dtype: torch.dtype
    gpus: int = 1
    train_tokens: int = 0  # in train.bin; 0 if unknown

    @property
    def sequences(self):
        return self.batch_size * self.micro_steps

    @property
    def mean_context(self):
        """Tokens per sequence, the mean over the updates of the run."""
        if not self.max_iters:  # a fraction of the time has more updates if the context is short
            updates = [fraction / context for fraction, context in self.contexts]
            return sum(u * context for u, (_, context) in zip(updates, self.contexts)) / sum(updates)
        return sum(fraction * context for fraction, context in self.contexts)

    @property
    def tokens_per_update(self):
        return self.sequences * self.mean_context

    @property
    def tokens(self):
        """Training tokens of the run; 0 if only the speed will tell."""
        return self.max_iters * self.tokens_per_update


def config_of(settings, data, vocab_size=0):
    """Return the GPTConfig of a run: a checkpoint's, GPT-2's, or that of the settings.

    data: the Dataset, or None; vocab_size: 0 for the dataset's, or GPT-2's padded one without a dataset.
    """
    s = settings
    if s['init_from'] in ('resume', 'auto') and (found := checkpoint.find_latest(s['out_dir'])):
        return GPTConfig(**found[1]['model_args'])
    if source := gpt2.find(s['init_from']):
        config = source.config()
        return replace(config, dropout=s['dropout'],
                       block_size=s['block_size'] if s.was_set('block_size') else config.block_size)
    known = 50304 if data is None or data.tokenizer['kind'] == 'gpt2' else data.vocab_size
    options = {f.name: s[f.name] for f in fields(GPTConfig) if f.name in s}
    return GPTConfig(**{**options, 'vocab_size': vocab_size or known})


def job_from(settings, config, dtype, data=None, gpus=1):
    """Return the Job of train.py's Settings. config: the GPTConfig; data: the Dataset, or None if not prepared."""
    s = settings
    updates_given = s.set_by_flag('max_iters')
    minutes = 0.0 if updates_given and not s.set_by_flag('max_minutes') else s['max_minutes']
    short = 0.0 if updates_given and not s.set_by_flag('context_warmup') else s['context_warmup']
    if data and data.marks:
        short = 0.0  # dialogues are read whole
    T = config.block_size
    contexts = [(short / 2, T // 4), (short / 2, T // 2), (1 - short, T)]
    return Job(config, s['batch_size'],
               s['total_batch_tokens'] // (s['batch_size'] * T) or s['gradient_accumulation_steps'],
               0 if minutes and not updates_given else s['max_iters'], minutes,
               [(fraction, context) for fraction, context in contexts if fraction],
               **{name: s[name] for name in ('eval_interval', 'eval_iters', 'optimizer', 'lora_rank',
                                             'checkpoint_activations', 'parallel')},
               dtype=dtype, gpus=gpus, train_tokens=data.train.epoch_tokens(T) if data else 0)


# ---- parameters and FLOPs ----------------------------------------------------------------------------------------

def _skeleton(config):
    with torch.device('meta'):
        return GPT(config, init=False)


def parameters_by_part(config):
    """Return {part: number of parameters} of a GPTConfig; the parts add up to all of them."""
    model, parts = _skeleton(config), {}
    names = (('wte.', 'token embedding' + ', also the output head' * config.tie_weights),
             ('wpe.', 'position embedding'), ('.attn.', 'attention'), ('.mlp.', 'MLP'), ('lm_head', 'output head'),
             ('', 'norms and scales'))
    for name, p in model.named_parameters():
        part = next(part for key, part in names if key in name)
        parts[part] = parts.get(part, 0) + p.numel()
    return parts


def count(config):
    """Return the number of parameters of a GPTConfig, positions included."""
    return sum(parameters_by_part(config).values())


def _matrices(job):
    """Return (numbers in all matrices that multiply, in those of the blocks, in those of LoRA adapters)."""
    parts, model = parameters_by_part(job.config), _skeleton(replace(job.config, n_layer=1))
    blocks = parts['attention'] + parts['MLP']
    adapters = sum(job.lora_rank * sum(p.shape) for p in model.transformer.h.parameters() if p.dim() == 2)
    return model.lm_head.weight.numel() + blocks, blocks, adapters * job.config.n_layer


def flops_per_token(job, context=0):
    """Return the FLOPs of a training token's forward and backward pass, in contexts of `context` tokens (block_size).

    The sum is model.flops_per_token, 6 N + 12 L C T, plus what checkpoint_activations computes a second time: the
    blocks, but for the last matrix of each, which no gradient needs. LoRA: frozen weights have no gradients, so they
    cost 4 N, and the first matrix has no input whose gradient is wanted.
    """
    c, T = job.config, context or job.config.block_size
    everything, blocks, adapters = _matrices(job)
    attention = 4 * c.n_layer * c.n_embd * min(T, 2 * c.window or T)  # forward
    if job.lora_rank:
        first = 3 * c.n_embd**2
        total = 4 * everything - 2 * first + 6 * adapters + 3 * attention
    else:
        total = _skeleton(c).flops_per_token(T)
    if job.checkpoint_activations:
        last = 0
        if not (c.dropout or job.lora_rank):  # else something after that matrix needs its product
            last = _skeleton(replace(c, n_layer=1)).transformer.h[0].mlp.c_proj.weight.numel() * c.n_layer
        total += 2 * (blocks + adapters - last) + attention
    return total


def muon_flops(job):
    """Return the FLOPs of Muon's Newton-Schulz iteration per update: five steps of three products per matrix."""
    if job.optimizer != 'muon':
        return 0
    total = 0
    for name, p in _skeleton(replace(job.config, n_layer=1)).named_parameters():
        if p.dim() == 2 and '.h.' in name:
            parts = 3 if 'c_attn' in name else 1
            small, large = sorted((p.shape[0] // parts, p.shape[1]))
            total += parts * 5 * (4 * small**2 * large + 2 * small**3)
    return total * job.config.n_layer


def eval_flops(job):
    """Return the FLOPs of one evaluation: forward passes, a third of training's, over both splits' windows."""
    tokens = 2 * job.eval_iters * job.batch_size * job.config.block_size
    return tokens * flops_per_token(replace(job, checkpoint_activations=False, lora_rank=0)) / 3


def run_flops(job, max_iters=0):
    """Return the FLOPs of the run's updates and evaluations. max_iters: for a job with a time limit."""
    updates = max_iters or job.max_iters
    training = sum(fraction * context * flops_per_token(job, context) for fraction, context in job.contexts)
    evaluations = updates // job.eval_interval + 2
    return updates * (job.sequences * training + muon_flops(job)) + evaluations * eval_flops(job)


def minutes_from(job, seconds_per_update, seconds_per_eval):
    """Return (minutes, updates) of the run from the time of its parts.

    seconds_per_update: {context: seconds}. If max_minutes ends the run, the updates follow from it.
    """
    if job.max_iters:
        update = sum(fraction * seconds_per_update[context] for fraction, context in job.contexts)
        evaluations = job.max_iters // job.eval_interval + 2
        minutes = (job.max_iters * update + evaluations * seconds_per_eval) / 60
        if not 0 < job.max_minutes < minutes:
            return minutes, job.max_iters
        return job.max_minutes, job.max_iters * job.max_minutes / minutes
    per_minute = sum(60 * fraction / (seconds_per_update[context] + seconds_per_eval / job.eval_interval)
                     for fraction, context in job.contexts)
    return job.max_minutes, per_minute * job.max_minutes


# ---- memory ------------------------------------------------------------------------------------------------------

def memory(job, device_type, with_logits=False):
    """Return the Footprint of one rank; with several, what DDP and FSDP add or take is in it.

    DDP keeps a second copy of the gradients in its buckets. FSDP divides weights, gradients and optimizer state among
    the ranks, and gathers the largest unit, which is the embedding with the head, or a block. With several
    micro-batches a rank has all gradients until it has added them up.
    """
    found = footprint(job.config, job.batch_size, max(1, job.micro_steps // job.gpus), job.dtype, job.optimizer,
                      job.lora_rank, job.checkpoint_activations, device_type, with_logits)
    if job.gpus > 1 and job.parallel == 'fsdp':
        parts = parameters_by_part(job.config)
        block = (parts['attention'] + parts['MLP']) / job.config.n_layer
        unit = 4 * max(2 * block, sum(parts.values()) - block * job.config.n_layer)
        whole = unit if job.micro_steps <= job.gpus else found.gradients
        found = replace(found, weights=found.weights / job.gpus + unit, gradients=found.gradients / job.gpus + whole,
                        optimizer=found.optimizer / job.gpus)
    elif job.gpus > 1:
        found = replace(found, gradients=2 * found.gradients)
    return found


def largest_batch(job, device_type, budget):
    """Return the largest batch_size with the same tokens per update whose tensors fit `budget` bytes; 0 if none.

    Memory is taken to grow in proportion to the batch from one and two times job.batch_size on, which it does but for
    the logits of a large vocabulary.
    """
    one, two = (memory(replace(job, batch_size=n * job.batch_size), device_type).total for n in (1, 2))
    per_sequence = (two - one) / job.batch_size
    most = job.batch_size + (budget - one) / per_sequence
    per_rank = job.sequences // job.gpus
    return max((n for n in range(1, per_rank + 1) if per_rank % n == 0 and n <= most), default=0)


def checkpoint_bytes(job):
    """Return the bytes of last.pt: 4 per weight, and 8 more per trained one for AdamW, 4 for Muon."""
    everything, (_, blocks, adapters) = count(job.config), _matrices(job)
    if job.lora_rank:
        return 4 * everything + 12 * adapters
    return 12 * everything - (4 * blocks if job.optimizer == 'muon' else 0)


# ---- sentences ---------------------------------------------------------------------------------------------------

def size(n_bytes):
    """Return bytes as 850 MB or 1.49 GB (powers of ten, as on a data sheet)."""
    return f'{n_bytes / 1e9:.2f} GB' if n_bytes >= 1e9 else f'{n_bytes / 1e6:.0f} MB'


def about(value):
    """Return a positive number as people write it, in two digits or whole: 0.21, 1.8, 18, 1,124 (not 1.1e+03)."""
    return f'{value:.2g}' if value < 9.95 else f'{value:,.0f}'


def data_sentence(job, tokens):
    """Return one line on `tokens` of training: per parameter, and how often they read train.bin."""
    per = tokens / count(job.config)
    line = f'{human_number(tokens)} tokens, {about(per)} per parameter (Chinchilla: {CHINCHILLA})'
    if not job.train_tokens:
        return line
    epochs = tokens / job.train_tokens
    line += f', {about(epochs)} epochs of train.bin ({human_number(job.train_tokens)} tokens)'
    if epochs > REPEATS:
        line += f'; past {REPEATS} epochs repeated text teaches less and less, and a large model memorises it'
    return line


def one_line(job, seconds_per_update, n_bytes=0, updates_done=0):
    """Return (minutes, epochs, train.py's line on time, memory and epochs) for the rest of a run.

    seconds_per_update: at full context, see trial.probe; shorter contexts are taken to be faster in proportion, and a
    forward pass alone to take a third. n_bytes: memory at the peak; 0 is left out.
    """
    T, left = job.config.block_size, replace(job, max_iters=max(0, job.max_iters - updates_done))
    evaluation = seconds_per_update * job.gpus / job.micro_steps / 3 * 2 * job.eval_iters / job.gpus
    minutes, updates = minutes_from(left if job.max_iters else job, {
        context: seconds_per_update * context / T for _, context in job.contexts}, evaluation)
    tokens = updates * job.tokens_per_update
    epochs = tokens / job.train_tokens if job.train_tokens else 0.0
    read = f' ({about(epochs)} epochs)' if epochs else ''
    held = f', {size(n_bytes)} of memory' if n_bytes else ''
    noun = 'update' if round(updates) == 1 else 'updates'
    return minutes, epochs, (f'plan: about {duration(minutes)} for {human_number(round(updates))} {noun}, '
                             f'{human_number(tokens)} tokens{read}{held}')


def long_run_warning(minutes, limit=60, job=None, device_type='cpu'):
    """Return a warning for a run of more than `limit` minutes, naming settings that make it short; '' otherwise.

    Also '' for the Job of a large model on a GPU, which is meant to be long.
    """
    if minutes <= limit or (job and device_type == 'cuda' and count(job.config) > LARGE):
        return ''
    return (f'this run takes about {duration(minutes)}; --max_minutes=3 in place of --max_iters trains for three '
            'minutes, config/train_shakespeare_char.py is a recipe made for that, and a smaller --n_layer, --n_embd or '
            '--block_size makes each update shorter')
