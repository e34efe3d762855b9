"""Train a GPT.

    python train.py config/train_shakespeare_char.py                    on whatever this machine has
    python train.py config/train_shakespeare_char.py --device=cpu       three minutes on two cores
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --help                                              every setting

Any setting below is overridden by Python config files and by --key=value, which wins. Ctrl-C saves and says how to
go on. The model is in model.py; with this file open beside it you see all of one training step.
"""
import math
import sys
import textwrap
import time

import torch

from configurator import UserError, configure
from lib.generate import complete
from lib.machine import runtime
from lib.text import tokenizer
from lib.text.dataset import eval_starts, eval_windows, train_starts
from lib.training import log as report
from lib.training import preflight
from lib.training.optim import make_optimizer, restore, z_score
from lib.training.trackers import open_trackers
from lib.weights import checkpoint, gpt2, load_model, lora
from model import GPT, GPTConfig

# output
out_dir = 'out'  # folder for checkpoints and log.jsonl, relative to the working directory
eval_interval = 2000  # updates between evaluations, each of which saves
log_interval = 1  # updates between printed lines
eval_iters = 200  # batches an evaluation reads from each split
eval_only = False  # evaluate the whole validation split, print, write nothing, end
always_save_checkpoint = False  # ckpt.pt holds the newest model instead of the best
init_from = 'scratch'  # scratch | resume | auto (resume if there is a checkpoint) | gpt2* | a folder with GPT-2 weights
patience = 0  # stop after so many evaluations without a better validation loss; 0 off
sample_interval = 0  # evaluations between short samples in the log; 0 off

# tracking
wandb_log = False  # send the log to wandb
wandb_project = 'owt'  # wandb project
wandb_run_name = 'gpt2'  # wandb run name
tensorboard_log = False  # write TensorBoard event files into out_dir/tensorboard

# data
dataset = 'openwebtext'  # folder under data/
data_order = 'epochs'  # epochs (every window once an epoch) | random (crops anywhere, as nanoGPT draws them)
gradient_accumulation_steps = 5 * 8  # micro-batches an update, over all ranks together
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # context, tokens
context_warmup = 0.0  # share of a run with short contexts, block_size / 4, then / 2. --max_iters switches it off
total_batch_tokens = 0  # tokens an update: derives gradient_accumulation_steps; 0 off

# model
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining, 0.1 or more where data is short
bias = False  # biases in Linear and LayerNorm, as in GPT-2
pos = 'learned'  # learned | rope
norm = 'layernorm'  # layernorm | rmsnorm
mlp = 'gelu'  # gelu | gelu_tanh (OpenAI's GPT-2) | relu2 | swiglu
qk_norm = False  # normalise queries and keys
tie_weights = True  # share the embedding with the output head
softcap = 0.0  # keep logits within +-softcap; 0 off
smear = False  # add a share of the token before to each token's embedding
lora_rank = 0  # fine-tune with low-rank adapters of this rank and the weights frozen; 0 off
checkpoint_activations = False  # recompute blocks in the backward pass: less memory, a third more time

# optimizer
optimizer = 'adamw'  # adamw | muon (for the blocks' matrices; AdamW for the rest)
learning_rate = 6e-4  # AdamW's peak
muon_lr = 0.02  # Muon's peak
muon_momentum = 0.95  # Muon's; 0.9 learns more in runs of some hundred updates
max_iters = 600000  # updates
max_minutes = 0.0  # train by the clock, from process start; 0 off. --max_iters switches it off
weight_decay = 1e-1  # on 2-D parameters
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
grad_clip = 1.0  # largest gradient norm; 0 off
spike_skip = 0.0  # skip an update whose gradient norm is so many standard deviations above the last 128; 0 off

# schedule
decay_lr = True  # False keeps learning_rate
lr_schedule = 'cosine'  # cosine | wsd (constant, then a linear cool-down)
warmup_iters = 2000  # updates of linear warm-up
lr_decay_iters = 600000  # cosine's length in updates; follows max_iters unless given
min_lr = 6e-5  # where the schedule ends; a tenth of learning_rate unless given
cooldown_frac = 0.5  # wsd: share of the run behind the warm-up that cools down

# machine
device = 'auto'  # cpu | cuda | cuda:1 | mps; the best there is unless given
dtype = 'auto'  # float32 | bfloat16 | float16; what the device does fast and safely unless given
compile = True  # torch.compile; where it pays unless given
backend = 'nccl'  # torch.distributed backend; nccl on CUDA and gloo on CPU unless given
parallel = 'ddp'  # ddp | fsdp (shards a model that does not fit one GPU)
dist_timeout = 600.0  # seconds without progress after which a job of several processes ends
peak_tflops = 0.0  # the device's peak for MFU; 0 looks it up or measures it
seed = 1337  # of weights, data order and dropout


def lr_factor(iter_num, done, floor):
    """Return the learning rate at update `iter_num` as a share of its peak; one factor serves AdamW and Muon.

    done: share of the decay that is past, 0 to 1. floor: the share it ends at.
    """
    if not decay_lr:
        return 1.0
    warmup = (iter_num + 1) / (warmup_iters + 1)
    if lr_schedule == 'wsd':
        return min(warmup, floor + (1 - floor) * min(1.0, (1 - done) / cooldown_frac))
    if iter_num < warmup_iters:
        return warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def next_windows(done, tokens_seen, n_rows, share):
    """Return (first, column, context): this update reads windows number `first` to first + n_rows, tokens column to
    column + context of each.

    A model first learns what is near, for which a short context does; the smaller updates are more for the same tokens
    (Li et al. 2021, 2108.06084). Windows that were begun are read to their ends, so an epoch still reads all of the
    text once. done: share of the run that is past, 0 to 1. share: that with short contexts.
    """
    context = block_size // (4 if done < share / 2 else 2 if done < share else 1)
    shortest = block_size // 4 if share else block_size
    column = tokens_seen // n_rows % block_size // shortest * shortest
    while column % context:
        context //= 2
    return (tokens_seen - column * n_rows) // block_size, column, context


def best_step(history):
    """Return the step of the evaluation with the lowest validation loss; history: [step, train loss, val loss] each."""
    return min(history, key=lambda h: h[2])[0] if history else 0


def evaluations_since_best(history):
    """Return how many evaluations came after the best one."""
    return sum(h[0] > best_step(history) for h in history)


def overfitting(history, rises=3):
    """True once validation loss has risen `rises` times in a row while training loss fell; said once a spell."""
    def worse(i):
        return history[i][2] > history[i - 1][2] and history[i][1] < history[i - 1][1]
    last = len(history) - 1
    spell = last >= rises and all(worse(i) for i in range(last, last - rises, -1))
    return spell and not (last > rises and worse(last - rises))


@torch.no_grad()
def mean_loss(fast, model, rt, batches):
    """Return the mean cross-entropy in nats over the targets of `batches`, which the ranks have shared out.

    fast: the compiled model, for batches of the shape it was compiled for. model: the same, for the odd one out.
    """
    model.eval()
    nats, count = torch.zeros((), device=rt.device), 0
    for batch in rt.in_step(batches):
        if batch is None:  # the other ranks' pass needs this one's share of the weights
            model(torch.zeros(1, 1, dtype=torch.int64, device=rt.device))
            continue
        idx, targets = batch
        usual = idx.shape == (batch_size, block_size)
        loss = (fast if usual else model)(*rt.put(idx, targets))[1]
        nats, count = nats + loss * targets.numel(), count + targets.numel()
    model.train()
    nats, count = rt.total(float(nats), count)
    return nats / count


def bits_per_byte(loss, split, n_targets):
    """Return `loss` (nats a token over n_targets tokens) in bits per byte of the split's text; None if unknown."""
    return loss * n_targets / (math.log(2) * split.n_bytes) if split.n_bytes else None


def whole_losses(fast, model, rt, data):
    """Return ([train, val] loss, val bits per byte): of the whole validation split, and of 2**16 training tokens."""
    losses = [mean_loss(fast, model, rt, eval_windows(split, block_size, batch_size, rt.rank, rt.world_size, most))
              for split, most in ((data.train, 2**16), (data.val, None))]  # millions take longer than some trainings
    return losses, bits_per_byte(losses[1], data.val, len(data.val) - 1)


def short_sample(model, tok):
    """Return 200 tokens from the beginning of a text; their generator is their own, so training does not notice."""
    model.eval()
    try:
        pieces = complete(model, tok, tok.start_ids, 1, 200, seed=seed, temperature=0.8, top_k=200)
        return ''.join(text for _, text, _ in pieces)
    except UserError as error:
        report.warn(f'no sample: {error.message}')
    finally:
        model.train()


def main():
    opened = {}  # what preflight reads on its way: the dataset, and the checkpoint to resume
    settings = configure(globals(), early={'device': runtime.pick_device}, check=lambda s: preflight.check(s, opened))
    data, resumed = opened['data'], opened['resume']
    rt = runtime.start(settings, compile_pays=True)
    say = report.say if rt.master else lambda line: None
    warn = report.warn if rt.master else lambda line: None
    rt.same('the dataset', data.fingerprint())
    rt.same(f'the checkpoint in {out_dir}', resumed and (str(resumed[0]), resumed[1].get('iter_num')))
    writes = rt.master and not eval_only
    lock = checkpoint.claim(out_dir) if writes else None
    if init_from == 'auto' and not resumed:
        say(f'no checkpoint in {out_dir}/: starting from scratch')

    # the model: from a checkpoint, from scratch, or from GPT-2's weights
    if resumed:
        path, state = resumed
        model = load_model.model_from_checkpoint(state, path, dropout=dropout)
    elif init_from in ('scratch', 'auto'):
        vocab_size = 50304 if data.tokenizer['kind'] == 'gpt2' else data.vocab_size  # 50257, padded for speed
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, pos, norm, mlp, qk_norm,
                              tie_weights, softcap, smear))
    else:
        model = gpt2.find(init_from).load(dropout=dropout, block_size=block_size)
    if lora_rank and not resumed:
        lora.adapt(model, lora_rank)
    model.set_compute_dtype(rt.dtype)  # weights stay float32
    model.checkpoint_activations = checkpoint_activations
    model = runtime.place(model, rt, parallel).train()
    opt = make_optimizer(optimizer, model.param_groups(weight_decay, muon=optimizer == 'muon'),
                         learning_rate, muon_lr, (beta1, beta2), rt.device.type, muon_momentum)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    micro_tokens = batch_size * block_size
    micro_steps = total_batch_tokens // micro_tokens or gradient_accumulation_steps  # of all ranks together
    n_rows = micro_steps * batch_size  # sequences an update
    tokens_per_iter = n_rows * block_size
    say(f'device: {rt.why}' + f'; {rt.world_size} processes' * (rt.world_size > 1))
    say(f'recipe: {report.recipe(settings, sys.argv[1:])}')
    say(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')
    by_clock = max_minutes > 0 and not settings.by_flag('max_iters')  # the schedule's axis: the clock, or updates
    # who counts updates means whole ones
    short = 0.0 if settings.by_flag('max_iters') and not settings.by_flag('context_warmup') else context_warmup
    say(report.tokens_line(tokens_per_iter, len(data.train), 0 if by_clock or short else max_iters))
    if short:
        say(f'context: {block_size // 4} tokens in the first {short / 2:.0%} of the run, {block_size // 2} until '
            f'{short:.0%}, then {block_size}')

    if writes and not resumed and (old := checkpoint.put_aside(out_dir)):  # now that there is a model to go there
        say(f'{out_dir} held an earlier run; its files are now in {old}')

    # where training stands; a checkpoint holds all of it
    iter_num, tokens_seen, minutes_before, best_val_loss, history, wandb_id = 0, 0, 0.0, math.inf, [], ''
    norms = torch.full((128,), math.nan, device=rt.device)  # of the last gradients, for spike_skip
    if resumed:
        iter_num, best_val_loss = state.get('iter_num', 0), float(state.get('best_val_loss', math.inf))
        tokens_seen = state.get('tokens_seen', iter_num * tokens_per_iter)
        minutes_before, history = state.get('minutes', 0.0), state.get('history', [])
        wandb_id, norms = state.get('wandb_id', ''), state.get('norms', norms).to(rt.device)
        for line in preflight.changes(state, settings, data):
            say(line)
        if not eval_only:
            say(f'resuming from iter {iter_num} ({path})')
            restore(opt, state['optimizer'], path)
            if state.get('scaler'):
                scaler.load_state_dict(state['scaler'])

    def try_step(compiled):
        starts = eval_starts(len(data.train), block_size, 1, batch_size)[0]
        compiled(*rt.put(*data.train.batch(starts, block_size)))[1].backward()

    fast = runtime.compile_or_fall_back(model, rt, settings.given('compile'), try_step)
    net = runtime.wrap(fast, rt, parallel)

    if eval_only:
        losses, bpb = whole_losses(fast, model, rt, data)
        say(report.step_line(iter_num, *losses, bpb))
        runtime.finish()
        return

    torch.manual_seed(seed + rt.rank)  # dropout differs between ranks; the data order needs no generator
    if resumed and not rt.set_rng_state(state.get('rng')):
        warn(f'{path} has no random state for this many processes on this device: resuming is not exact')
    untrained = not resumed and init_from in ('scratch', 'auto')
    resumed = state = None  # frees the checkpoint's tensors
    saved_iter, n_spikes = iter_num, 0
    log = f'{out_dir}/log.jsonl'
    if rt.master:
        report.trim_log(log, iter_num, history[-1][0] if history else -1)
    track, finish, wandb_id = (open_trackers(settings, out_dir, wandb_id, iter_num) if rt.master else
                               (lambda record, step: None, lambda: None, ''))
    tok = tokenizer.from_spec(data.tokenizer) if sample_interval else None
    peak_flops = runtime.peak_flops(rt, peak_tflops)

    time_limit = max_minutes if by_clock or settings.by_flag('max_minutes') else 0.0
    start = runtime.process_start()
    # a CPU run of hours is told so: at once where not even the peak speed would do, else by its third update
    at_peak = model.flops_per_token() * tokens_per_iter * (max_iters - iter_num) / peak_flops / 60  # minutes
    told = rt.device.type != 'cpu' or time_limit > 0 or not rt.master or report.warn_if_long(at_peak)
    third = iter_num + 2

    def clock():
        return minutes_before + (time.time() - start) / 60

    def snapshot():
        """Return the checkpoint: nanoGPT's six keys, then what exact resuming and sampling need; all ranks call it."""
        return {'model': runtime.whole(model.state_dict(), rt.master),
                'optimizer': runtime.whole(opt.state_dict(), rt.master), 'model_args': model.config.model_args(),
                'iter_num': iter_num, 'best_val_loss': best_val_loss, 'config': dict(settings),
                'format': checkpoint.FORMAT, 'tokenizer': data.tokenizer, 'data': data.fingerprint(),
                'rng': rt.rng_states(), 'scaler': scaler.state_dict(), 'tokens_seen': tokens_seen,
                'minutes': clock(), 'history': history, 'wandb_id': wandb_id, 'norms': norms}

    def save(also_ckpt, must):
        """Write last.pt, and ckpt.pt as the same file; a failure is an error where `must`, else a warning."""
        nonlocal saved_iter
        state, failure = snapshot(), ''
        if rt.maximum(load_model.has_nan(model))[0]:
            failure = f'the weights of iter {iter_num} are not finite; they were not saved'
        elif rt.master:
            try:
                say(f'saving checkpoint to {out_dir}')
                if lora_rank and also_ckpt:
                    checkpoint.save(f'{out_dir}/ckpt.pt', {**state, 'model': lora.merged(state['model'])})
                checkpoint.save(f'{out_dir}/last.pt', state, keep_previous=True,
                                also=f'{out_dir}/ckpt.pt' if also_ckpt and not lora_rank else None)
            except UserError as error:
                failure = error.message
        if failure and not must:
            warn(failure)
        if not rt.maximum(bool(failure))[0]:
            saved_iter = iter_num
        elif must:
            raise UserError(failure or 'rank 0 could not save')

    bar = report.progress_bar(100, show=rt.master)
    read_late, seconds, skipped, status = runtime.Late(rt), None, 0, 0
    with runtime.Signals() as signals:
        while True:
            minutes, level = rt.maximum(clock(), signals.level)  # every rank goes by the same clock and signal
            done = minutes / max_minutes if by_clock else (iter_num / max_iters if max_iters else 1.0)
            stalled = patience > 0 and evaluations_since_best(history) >= patience
            last = done >= 1 or stalled or 0 < time_limit <= minutes
            if last and history and history[-1][0] == iter_num:
                say(f'nothing left to do at iter {iter_num}: to train longer raise --max_iters, --max_minutes or '
                    '--patience, whichever ended the run')

            # once in a while: evaluate and save
            if (iter_num % eval_interval == 0 or last) and (not history or history[-1][0] < iter_num):
                losses = [mean_loss(fast, model, rt, (split.batch(starts, block_size) for starts in
                                                      eval_starts(len(split), block_size, eval_iters, batch_size)
                                                      [rt.rank::rt.world_size]))
                          for split in (data.train, data.val)]
                if not math.isfinite(sum(losses)):
                    raise UserError(report.not_finite(f'the losses are {losses[0]} and {losses[1]}', iter_num, rt,
                                                      saved_iter, out_dir))
                better, best_val_loss = losses[1] < best_val_loss, min(losses[1], best_val_loss)
                history.append([iter_num, *losses])
                bpb = bits_per_byte(losses[1], data.val, len(data.val))
                record = {'step': iter_num, 'train_loss': losses[0], 'val_loss': losses[1], 'val_bpb': bpb,
                          'train_bpb': bits_per_byte(losses[0], data.train, len(data.train)),
                          'tokens': tokens_seen, 'minutes': clock()}
                if last:  # the whole split is what other programs' numbers are compared with
                    say('the last evaluation reads the whole validation split')
                    losses, bpb = whole_losses(fast, model, rt, data)
                    record.update(whole_train_loss=losses[0], whole_val_loss=losses[1], whole_val_bpb=bpb)
                say(report.step_line(iter_num, *losses, bpb))
                if tok and (len(history) % sample_interval == 0 or last) and (sample := short_sample(model, tok)):
                    record['sample'] = sample
                    say(textwrap.indent(sample, '    | ', lambda line: True))
                if rt.master:
                    report.append_log(log, record)
                    track({f'eval/{k}': v for k, v in record.items()}, iter_num)
                if overfitting(history):
                    warn('overfitting: validation loss has risen for several evaluations while training loss '
                         f'fell; {"the best was" if always_save_checkpoint else "ckpt.pt keeps"} iter '
                         f'{best_step(history)}')
                save(also_ckpt=better or always_save_checkpoint, must=last)
            if last:
                break
            if level:
                if untrained and len(history) < 2:  # of ckpt.pt, which nobody wants then
                    best_val_loss = math.inf
                save(also_ckpt=always_save_checkpoint or best_val_loss == math.inf, must=level > 1)
                name = signals.name(level)
                say(f'{name}: saved iter {iter_num} to {out_dir}')
                if level > 1:
                    say('to go on, give the same command with --init_from=resume')
                    status = 128 + signals.number(level)
                    break
                if signals.level == level:  # no other came meanwhile
                    signals.level = 0

            # one update: forward, backward, clip, step
            decayed = done if by_clock else (iter_num - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
            factor = lr_factor(iter_num, min(1.0, max(0.0, decayed)), min_lr / learning_rate if learning_rate else 0.0)
            for group in opt.param_groups:
                group['lr'] = group['peak'] * factor
            logged = iter_num % log_interval == 0
            if logged:
                rt.synchronize()
            began = time.perf_counter()
            loss_sum = 0.0
            first, column, context = next_windows(done, tokens_seen, n_rows, short)
            for micro in range(rt.rank, micro_steps, rt.world_size):
                starts = column + train_starts(data_order, seed, len(data.train), block_size,
                                               first + micro * batch_size, batch_size)
                idx, targets = rt.put(*data.train.batch(starts, context))  # (B, T) each
                runtime.average_gradients(net, micro + rt.world_size >= micro_steps)  # after the last one only
                # so scaled, gradients end as the mean of all
                loss = net(idx, targets)[1] * rt.world_size / micro_steps
                scaler.scale(loss).backward()
                loss_sum = loss_sum + loss.detach()
            scaler.unscale_(opt)
            grad_norm = runtime.gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
            z, norms = z_score(grad_norm, norms) if spike_skip else (torch.zeros_like(grad_norm), norms)
            if not scaler.is_enabled():  # else the scaler does the same
                unfit = ~torch.isfinite(loss_sum + grad_norm) | (z > spike_skip)
                opt.found_inf = unfit.float()  # the update reads it on the device
            if rt.device.type != 'mps' or not unfit:  # Metal's update does not read it
                scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=True)

            # nothing that is not finite has reached the weights; the host learns of it without waiting for the device
            seen_loss, seen_norm, seen_z = read_late(torch.stack([loss_sum, grad_norm, z]))
            skipped = 0 if math.isfinite(seen_loss + seen_norm) else skipped + 1
            if skipped > (20 if scaler.is_enabled() else 0):
                what = f'the loss is {seen_loss}, the norm of its gradient {seen_norm}'
                raise UserError(report.not_finite(what, iter_num - read_late.calls, rt, saved_iter, out_dir))
            if 0 < spike_skip < seen_z:
                n_spikes += 1
                if rt.master:
                    report.spike(log, iter_num - read_late.calls, seen_norm, seen_z, n_spikes)
            if logged:
                rt.synchronize()
                dt = time.perf_counter() - began
                seconds = dt if seconds is None else 0.9 * seconds + 0.1 * dt
                left = max_minutes - minutes if by_clock else seconds * (max_iters - iter_num - 1) / 60
                loss = rt.total(float(loss_sum))[0] / rt.world_size
                tok_s = n_rows * context / dt
                record = {'iter': iter_num, 'loss': loss, 'lr': learning_rate * factor, 'grad_norm': float(grad_norm),
                          'tok_s': tok_s, 'tokens': tokens_seen + n_rows * context, 'minutes': clock(),
                          'mfu': None if lora_rank else model.estimate_mfu(tok_s / rt.world_size, peak_flops, context)}
                say(report.iter_line(record, dt, left))
                if rt.master:
                    report.append_log(log, record)
                    track({f'train/{k}': v for k, v in record.items()}, iter_num)
                    report.advance(bar, done, loss, best_val_loss, tok_s, left)
                told = told or iter_num >= third and report.warn_if_long(left)
            iter_num, tokens_seen = iter_num + 1, tokens_seen + n_rows * context
    bar.close()
    if rt.master and not status and (picture := report.draw_loss(out_dir)):
        say(f'loss curves are in {picture}')
        track({'curves': picture}, iter_num)
    finish()
    runtime.finish()
    del lock  # held until here
    if status:
        raise SystemExit(status)


if __name__ == '__main__':
    with runtime.one_of_many():
        main()
