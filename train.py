"""Train a GPT.

    python train.py config/train_shakespeare_char.py                    on whatever this machine has
    python train.py config/train_shakespeare_char.py --device=cpu       three minutes on two cores
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --help                                              every setting

Config files and --key=value flags override the settings below. Ctrl-C saves and prints how to resume. With this file
and model.py open you see one complete training step.
"""
import math
import textwrap
import time
from dataclasses import dataclass, field, fields

import torch

from lib.generate import sample_text
from lib.machine import compiler, distributed, runtime
from lib.machine import device as devices
from lib.machine.signals import Signals
from lib.text import tokenizer
from lib.text.dataset import eval_starts, next_windows, split_batches, train_starts
from lib.training import curves, log, preflight, trial
from lib.training.guard import Guard
from lib.training.optim import clip_grad_norm_, decay_for_epochs, load_optimizer_state, make_optimizer
from lib.training.trackers import open_trackers
from lib.weights import checkpoint, load_model, lora
from lib.weights.saver import Saver
from model import GPT, GPTConfig

# output
out_dir = 'out'  # folder for checkpoints and log.jsonl, relative to the working directory
eval_interval = 2000  # updates between evaluations, which save; with max_minutes at least eight per run
log_interval = 1  # updates between printed lines
eval_iters = 200  # batches per split in an evaluation
eval_only = False  # evaluate the whole validation split and a part of the training split, print, write nothing
always_save_checkpoint = False  # ckpt.pt holds the newest model instead of the best
init_from = 'scratch'  # scratch | resume | auto (resume, else scratch) | gpt2* | folder of a run or of GPT-2 weights
patience = 0  # stop after this many evaluations without a better validation loss; 0 = off
sample_interval = 0  # evaluations between short samples in the log; 0 = off

# tracking
wandb_log = False  # also send the log to wandb
wandb_project = 'owt'  # wandb project
wandb_run_name = 'gpt2'  # wandb run name
tensorboard_log = False  # also write TensorBoard event files into out_dir/tensorboard

# data
dataset = 'openwebtext'  # folder under data/
gradient_accumulation_steps = 5 * 8  # micro-batches per update, over all ranks together
batch_size = 12  # sequences per micro-batch
block_size = 1024  # context length in tokens
context_warmup = 0.0  # fraction of the run with short contexts: block_size/4, then /2. --max_iters turns a config's off
total_batch_tokens = 0  # tokens per update; sets gradient_accumulation_steps. 0 = off

# model
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining, 0.1 or more for small datasets
bias = False  # True: biases in Linear and LayerNorm, as GPT-2 has
pos = 'learned'  # learned | rope
norm = 'layernorm'  # layernorm | rmsnorm (also initialises output projections and an untied head to zero)
mlp = 'gelu'  # gelu | gelu_tanh (OpenAI's GPT-2) | relu2 | swiglu
qk_norm = False  # normalise queries and keys
tie_weights = True  # the embedding matrix is also the output head
softcap = 0.0  # keep logits within +-softcap; 0 = off
window = 0  # positions that attention sees, the present one included; 0 = all before it
smear = False  # add a learned fraction of the previous token's embedding
lora_rank = 0  # fine-tune low-rank adapters of this rank and freeze the weights; 0 = off
checkpoint_activations = False  # recompute blocks in the backward pass: less memory, a third more time

# optimizer
optimizer = 'adamw'  # adamw | muon (for the matrices of the blocks, AdamW for the rest)
learning_rate = 6e-4  # peak, AdamW
muon_lr = 0.02  # peak, Muon
muon_momentum = 0.95  # 0.9 learns more in runs of a few hundred updates
max_iters = 600000  # updates
max_minutes = 0.0  # minutes to train, from the start of the process; 0 = off. --max_iters turns a config's value off
weight_decay = 1e-1  # on 2-D parameters
epoch_decay = 0.0  # weight_decay is at least this times the square root of the epochs that the run will read; 0 = off
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
grad_clip = 1.0  # largest gradient norm; 0 = off

# schedule
decay_lr = True  # False keeps the learning rate constant
lr_schedule = 'cosine'  # cosine | wsd (constant, then a linear decay)
warmup_iters = 2000  # updates of linear warm-up
lr_decay_iters = 600000  # length of the schedule in updates; follows max_iters unless given
min_lr = 6e-5  # where the schedule ends; a tenth of learning_rate unless given
cooldown_frac = 0.5  # wsd: the last fraction of the schedule, in which the rate decays

# machine
device = 'auto'  # cpu | cuda | cuda:1 | mps; the best available unless given
dtype = 'auto'  # float32 | bfloat16 | float16; what the device does fast and safely unless given
compile = True  # torch.compile; where it pays unless given
bf16_residual = False  # the residual stream is bfloat16 where dtype is; less memory traffic on a GPU
backend = 'nccl'  # torch.distributed backend; nccl on CUDA and gloo on CPU unless given
parallel = 'ddp'  # ddp | fsdp (shards a model that does not fit one GPU)
bf16_gradients = False  # ranks exchange gradients in bfloat16: half as many bytes; ddp only
dist_timeout = 600.0  # seconds without progress after which a run on several ranks ends
peak_tflops = 0.0  # the device's peak for MFU; 0 = looked up or measured on a GPU, no MFU on a CPU
seed = 1337  # for weights, data order and dropout


@dataclass
class Progress:
    """Where training stands. A checkpoint holds all of it, so that a resumed run continues exactly."""
    iter_num: int = 0  # updates done; "step" in evaluations, "iter" in the log
    tokens_seen: int = 0
    minutes: float = 0.0  # of running, added up over resumes
    best_val_loss: float = math.inf
    history: list = field(default_factory=list)  # [step, train loss, val loss] of each evaluation
    wandb_id: str = ''
    threads: int = -1  # chosen because other programs use the CPUs; 0: all of them; -1: not chosen yet


def run_fraction(iter_num, minutes, by_clock):
    """Return the fraction of the run that is over (1 or more: all of it), in time or in updates."""
    if by_clock:
        return minutes / max_minutes
    return iter_num / max_iters if max_iters else 1.0


def get_lr_scale(iter_num, fraction, by_clock):
    """Return the learning rate as a fraction of its peak; one schedule serves AdamW and Muon.

    fraction: see run_fraction. The schedule: in time the whole run, in updates warmup_iters to lr_decay_iters.
    """
    if not decay_lr:
        return 1.0
    decayed = fraction if by_clock else (iter_num - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    decayed = min(1.0, max(0.0, decayed))
    floor = min_lr / learning_rate if learning_rate else 0.0
    warmup = (iter_num + 1) / (warmup_iters + 1)
    if lr_schedule == 'wsd':
        return min(warmup, floor + (1 - floor) * min(1.0, (1 - decayed) / cooldown_frac))
    if iter_num < warmup_iters:
        return warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decayed))


@torch.no_grad()
def estimate_loss(compiled_model, raw_model, rt, batches):
    """Return the mean cross-entropy in nats over the targets of all ranks' `batches`.

    compiled_model handles full batches; a shorter one goes through raw_model, so that nothing is recompiled.
    """
    raw_model.eval()
    nats, count = torch.zeros((), device=rt.device), 0
    for batch in rt.pad_to_longest_rank(batches):
        if batch is None:  # under FSDP every rank must run the forward pass, even without data
            raw_model(torch.zeros(1, 1, dtype=torch.int64, device=rt.device))
            continue
        idx, targets = batch
        n_targets = int((targets != -1).sum())
        model = compiled_model if idx.shape == (batch_size, block_size) else raw_model
        _, loss = model(*rt.to_device(idx, targets))
        nats, count = nats + loss * n_targets, count + n_targets
    raw_model.train()
    nats, count = rt.all_reduce_sum(float(nats), count)
    return nats / max(1, count)


def final_losses(compiled_model, raw_model, rt, data):
    """Return ([train, val] loss, val bits per byte) of the whole validation split and of 2**16 training tokens.

    Reading millions of training tokens would take longer than a short run.
    """
    losses = []
    for split, max_targets in ((data.train, 2**16), (data.val, None)):
        batches = split_batches(split, block_size, batch_size, rt.rank, rt.world_size, max_targets)
        batches = log.progress(batches, len(batches), 'last evaluation', show=rt.is_master)
        losses.append(estimate_loss(compiled_model, raw_model, rt, batches))
    return losses, data.val.bits_per_byte(losses[1], data.val.n_targets)


def evaluate(compiled_model, raw_model, rt, data, p, guard, last, say):
    """Estimate both losses and add them to p.history; return the step line and the record for the log.

    The last evaluation also reads the whole validation split, which other programs' numbers are compared with.
    """
    losses = []
    for split in (data.train, data.val):
        starts = eval_starts(len(split), block_size, eval_iters, batch_size, split.dialogues)
        batches = (split.batch(row, block_size) for row in starts[rt.rank::rt.world_size])
        losses.append(estimate_loss(compiled_model, raw_model, rt, batches))
    guard.check_losses(losses, p.iter_num)
    p.history.append([p.iter_num, *losses])
    bpb = data.val.bits_per_byte(losses[1])
    record = {'step': p.iter_num, 'train_loss': losses[0], 'val_loss': losses[1], 'val_bpb': bpb,
              'train_bpb': data.train.bits_per_byte(losses[0]),
              'tokens': p.tokens_seen, 'minutes': p.minutes, 'val_data': data.val.sha256[:12]}
    if last:
        say('the last evaluation reads the whole validation split')
        losses, bpb = final_losses(compiled_model, raw_model, rt, data)
        record.update(whole_train_loss=losses[0], whole_val_loss=losses[1], whole_val_bpb=bpb)
    since_best = curves.evaluations_since_best(p.history)
    return log.step_line(p.iter_num, *losses, bpb, since_best, patience), record


def build_model(settings, data, resumed):
    """Return the model: from a checkpoint, from another run or GPT-2, or initialised from scratch."""
    if resumed:
        path, state = resumed
        return load_model.model_from_checkpoint(state, path, assign=parallel == 'fsdp', dropout=dropout)
    if source := load_model.find(init_from):
        model = source.load(dropout=dropout, block_size=block_size)
    else:
        options = {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
        vocab_size = 50304 if data.tokenizer['kind'] == 'gpt2' else data.vocab_size  # 50257, padded for speed
        model = GPT(GPTConfig(vocab_size=vocab_size, **options))
    if lora_rank:
        lora.adapt(model, lora_rank)
    return model


def restore(resumed, settings, data, opt, scaler, by_clock, say):
    """Return the Progress of a checkpoint, with the optimizer and the scaler as they were; print what differs."""
    path, state = resumed
    p = Progress(**{f.name: state[f.name] for f in fields(Progress) if f.name in state})
    for line in preflight.resume_changes(state, settings, data):
        say(line)
    if preflight.other_data(state, data):  # losses on different texts cannot be compared
        p.best_val_loss, p.history = math.inf, []
    if not eval_only:
        say(f'resuming from iter {p.iter_num} ({path})')
        load_optimizer_state(opt, state['optimizer'], path)
        if state.get('scaler'):
            scaler.load_state_dict(state['scaler'])
        before = state['optimizer']['param_groups'][-1].get('lr', 0.0)
        now = learning_rate * get_lr_scale(p.iter_num, run_fraction(p.iter_num, p.minutes, by_clock), by_clock)
        say(f'learning rate: {before:.3g} in the last update, {now:.3g} in the next')
    return p


def main(signals):
    settings, data, resumed = preflight.open_run(globals())  # checks everything before anything is built
    rt = runtime.start(settings, trains=True)
    say, warn = (log.say, log.warn) if rt.is_master else (log.ignore, log.ignore)
    rt.assert_same_on_all_ranks('the dataset', data.fingerprint())
    rt.assert_same_on_all_ranks(f'the checkpoint in {out_dir}', resumed and (str(resumed[0]), resumed[1]['iter_num']))
    lock = checkpoint.lock_out_dir(out_dir) if rt.is_master and not eval_only else None

    raw_model = build_model(settings, data, resumed)
    raw_model.set_compute_dtype(rt.dtype, bf16_residual)  # weights stay float32
    raw_model.checkpoint_activations = checkpoint_activations
    raw_model = distributed.shard_or_move(raw_model, rt, parallel).train()
    opt = make_optimizer(optimizer, raw_model.param_groups(weight_decay, muon=optimizer == 'muon'), learning_rate,
                         muon_lr, (beta1, beta2), rt.device.type, muon_momentum)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    by_clock = max_minutes > 0 and not settings.set_by_flag('max_iters')  # what the schedule follows
    micro_steps = total_batch_tokens // (batch_size * block_size) or gradient_accumulation_steps  # over all ranks
    sequences = micro_steps * batch_size  # per update
    for line in log.banner(rt, settings, data, raw_model, sequences, 0 if by_clock else max_iters, resumed):
        say(line)
    if rt.is_master and not eval_only and not resumed and (old := checkpoint.archive_old_run(out_dir)):
        say(f'{out_dir} held an earlier run; its files are now in {old}')
    p = restore(resumed, settings, data, opt, scaler, by_clock, say) if resumed else Progress()

    # one batch of every shape that training uses, to compile and to time the model
    starts = eval_starts(len(data.train), block_size, 1, batch_size, data.train.dialogues)[0]
    contexts = [block_size // 4, block_size // 2, block_size] if context_warmup else [block_size]
    batches = [rt.to_device(*data.train.batch(starts, context)) for context in contexts]
    micro_steps_left = (max_iters - p.iter_num) * micro_steps / rt.world_size
    compiled_model = compiler.compile_or_fall_back(
        raw_model, rt, settings.was_set('compile'), compiler.step_in_all_shapes(raw_model, batches),
        lambda step_seconds: min(step_seconds * micro_steps_left, 60 * max_minutes or math.inf))
    model = distributed.wrap_ddp(compiled_model, rt, parallel, bf16_gradients)
    if eval_only:
        losses, bpb = final_losses(compiled_model, raw_model, rt, data)
        say(log.step_line(p.iter_num, *losses, bpb))
        distributed.finish()
        return

    p.threads = trial.choose_threads(raw_model, batches[0], rt, p.threads, say)
    trial.announce(compiled_model, batches[-1], settings, data, raw_model, opt, rt, p.iter_num, say, warn)
    torch.manual_seed(seed + rt.rank)  # dropout differs between ranks; the data order needs no generator
    if resumed and not rt.set_rng_state(resumed[1].get('rng')):
        warn(f'{resumed[0]} has no random state for this many processes on this device: resuming is not exact')
    untrained = not resumed and not load_model.find(init_from)
    resumed = None  # frees the checkpoint's tensors
    track, finish_trackers, p.wandb_id = open_trackers(settings, out_dir, p.wandb_id, p.iter_num, rt.is_master)
    if rt.is_master:
        log.trim_log(f'{out_dir}/log.jsonl', p.iter_num, p.history[-1][0] if p.history else -1)
    tok = tokenizer.from_spec(data.tokenizer) if sample_interval else None
    peak_flops = devices.peak_flops(rt, peak_tflops)
    guard, bar = Guard(rt, scaler, out_dir, p.iter_num), log.progress_bar(100, show=rt.is_master)
    saver, minutes_before, status, eighth = Saver(rt, out_dir, lock, p.iter_num, say, warn), p.minutes, 0, 0
    elapsed, updates, tokens = 0.0, 0, 0  # since the last printed line; seconds without evaluation and saving

    def minutes_now():
        return minutes_before + runtime.minutes_running()

    def write_log(kind, line, record):
        say(line)
        if rt.is_master:
            log.append_log(f'{out_dir}/log.jsonl', record)
            track({f'{kind}/{key}': value for key, value in record.items() if key != 'val_data'}, p.iter_num)

    def save(as_best, required, wait=True):
        """Write last.pt, and ckpt.pt if `as_best`; every rank calls it. required: a failure ends the run."""
        state = {**vars(p), 'minutes': minutes_now(), 'model_args': raw_model.config.model_args(),
                 'model': distributed.full_state_dict(raw_model, rt.is_master), 'scaler': scaler.state_dict(),
                 'optimizer': distributed.full_state_dict(opt.state_dict(), rt.is_master),
                 'config': dict(settings), 'origins': settings.kinds(), 'format': checkpoint.FORMAT,
                 'tokenizer': data.tokenizer, 'chat': data.marks, 'data': data.fingerprint(), 'rng': rt.rng_states()}
        guard.saved_iter = saver.save(state, raw_model, as_best, required, wait)

    rt.interrupted = lambda: signals.level > 1
    with signals.held():
        while True:
            p.minutes, signal = rt.all_reduce_max(minutes_now(), signals.level)  # the same on every rank
            fraction = run_fraction(p.iter_num, p.minutes, by_clock)  # of the run; 1 or more: it is over
            out_of_patience = 0 < patience <= curves.evaluations_since_best(p.history)
            last = fraction >= 1 or out_of_patience or 0 < max_minutes <= p.minutes
            evaluated = bool(p.history) and p.history[-1][0] >= p.iter_num
            if last and evaluated:
                say(f'nothing left to do at iter {p.iter_num}: to train longer raise --max_iters, --max_minutes or '
                    '--patience, whichever ended the run')

            # once in a while, with max_minutes at most once in an eighth of the run: evaluate, sample, save
            due = p.iter_num % eval_interval == 0 or (by_clock and max(len(p.history), eighth + 1) <= int(8 * fraction))
            ending = signal > 1  # save at once, without an evaluation: a cluster may not wait
            if (due or last) and not evaluated and not ending:
                line, record = evaluate(compiled_model, raw_model, rt, data, p, guard, last, say)
                if rt.all_reduce_max(rt.interrupted())[0]:  # the evaluation ended early
                    p.history.pop()
                    continue
                if tok and (len(p.history) % sample_interval == 0 or last):
                    record['sample'] = sample_text(raw_model, tok, data, len(p.history), seed, warn)
                    line += '\n' + textwrap.indent(record['sample'], '    | ', lambda line: True)
                write_log('eval', line, record)
                if curves.overfitting_starts(p.history):
                    warn('overfitting: the validation loss has risen above its best while the training loss fell; best '
                         f'is iter {curves.best_step(p.history)}{", in ckpt.pt" * (not always_save_checkpoint)}')
                better, p.best_val_loss = record['val_loss'] < p.best_val_loss, min(record['val_loss'], p.best_val_loss)
                save(as_best=better or always_save_checkpoint, required=last, wait=False)
                eighth = int(8 * rt.all_reduce_max(run_fraction(p.iter_num, minutes_now(), by_clock))[0])
            if last and (evaluated or not ending):
                break
            if signal:
                if untrained and len(p.history) < 2:  # ckpt.pt holds the untrained model: let this save replace it
                    p.best_val_loss = math.inf
                save(as_best=always_save_checkpoint or p.best_val_loss == math.inf, required=ending)
                say(f'{signals.name(signal)}: saved iter {p.iter_num} to {out_dir}')
                if ending:
                    say('to resume, give the same command with --init_from=resume')
                    status = 128 + signals.number(signal)
                    break
                if signals.level == signal:  # no other signal arrived meanwhile
                    signals.level = 0

            # one update: forward, backward, clip, step
            began = time.perf_counter()
            lr_scale = get_lr_scale(p.iter_num, fraction, by_clock)
            epochs = p.tokens_seen / data.train.epoch_tokens(block_size) / fraction if fraction else 0.0  # of the run
            for group in opt.param_groups:
                group['lr'] = group['initial_lr'] * lr_scale
                group['weight_decay'] = decay_for_epochs(group['initial_decay'], epoch_decay, epochs,
                                                         sequences * block_size)
            first, offset, context = next_windows(p.tokens_seen, sequences, block_size, fraction, context_warmup)
            starts = offset + train_starts(seed, len(data.train), block_size, first, sequences, data.train.dialogues)
            weights = data.train.weights(starts, micro_steps)  # all 1 unless the data has a mask
            total_loss = 0.0
            for micro_step in range(rt.rank, micro_steps, rt.world_size):
                rows = starts[micro_step * batch_size:(micro_step + 1) * batch_size]
                idx, targets = rt.to_device(*data.train.batch(rows, context))  # (B, T) each
                distributed.set_grad_sync(model, micro_step + rt.world_size >= micro_steps)  # only after the last
                _, loss = model(idx, targets)
                # the gradient is the mean over the targets of all micro-batches and ranks
                loss = loss * weights[micro_step] * rt.world_size / micro_steps
                scaler.scale(loss).backward()
                total_loss = total_loss + loss.detach()  # stays on the device: no sync
            scaler.unscale_(opt)
            grad_norm = distributed.full_tensor(clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf))
            if guard.allows(opt, total_loss, grad_norm):  # the device skips a non-finite update; False only on Metal
                scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=True)
            guard.check(p.iter_num)  # ends the run if the loss or gradient was not finite; the weights are intact

            # log
            logged = p.iter_num % log_interval == 0
            loss = float(total_loss) if logged else None  # waits for the device
            p.tokens_seen += sequences * context
            elapsed, updates, tokens = elapsed + time.perf_counter() - began, updates + 1, tokens + sequences * context
            if logged:
                loss, tok_s = rt.all_reduce_sum(loss)[0] / rt.world_size, tokens / elapsed
                left = math.inf if by_clock else elapsed / updates * (max_iters - p.iter_num - 1) / 60
                left = min(left, (max_minutes or math.inf) - p.minutes)  # whichever limit comes first
                mfu = None if lora_rank or not peak_flops else (  # the fraction of the devices' peak that is used
                    raw_model.flops_per_token(context) * tok_s / rt.world_size / peak_flops)
                record = {'iter': p.iter_num, 'loss': loss, 'lr': learning_rate * lr_scale, 'tok_s': tok_s, 'mfu': mfu,
                          'grad_norm': float(grad_norm), 'tokens': p.tokens_seen, 'minutes': minutes_now()}
                write_log('train', log.iter_line(record, elapsed / updates, left), record)
                log.update_bar(bar, fraction, loss, p.best_val_loss, tok_s, left)
                elapsed, updates, tokens = 0.0, 0, 0
            p.iter_num += 1
    bar.close()
    if not p.iter_num and 0 < max_minutes <= p.minutes:
        warn(f'max_minutes={max_minutes:g} was over before the first update, so the model is untrained')
    if rt.is_master and not status and (picture := curves.draw_loss(out_dir)):
        say(f'loss curves are in {picture}')
        track({'curves': picture}, p.iter_num)
    finish_trackers()
    distributed.finish()
    del lock  # held until here
    if status:
        raise SystemExit(status)


if __name__ == '__main__':
    with distributed.report_fatal_errors(), Signals() as caught:
        main(caught)
