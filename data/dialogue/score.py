"""Score a model on every held-out question of data/dialogue: exact answers, by task and language.

    python data/dialogue/score.py --out_dir=out-dialogue
"""
import json
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, configure, find_path
from lib.machine import device as devices
from lib.text import dialogue
from lib.training import log
from lib.weights.load_model import load_model
from model import KVCache

out_dir = 'out-dialogue'  # folder of the training run, relative to the working directory
device = 'auto'  # cpu | cuda | mps; the best available unless set
rows = ''  # JSON lines like those of prepare.py; '' = its validation rows
show = 5  # wrong answers to print


def held_out():
    """Return the rows to score; UserError if prepare.py has not written them."""
    path = find_path(rows) if rows else Path(__file__).resolve().with_name('input-val.jsonl')
    if not path.exists():
        raise UserError(f'{path} not found. Run: python data/dialogue/prepare.py')
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def questions(dialogues):
    """Yield (task, language, what was said before, question, right answer) for each question that is scored.

    What was said before has the right answers, not the model's.
    """
    for row in dialogues:
        system, exchanges = dialogue.from_messages(row['messages'], 'data/dialogue')
        for n, (task, (question, answer)) in enumerate(zip(row['tasks'], exchanges, strict=True)):
            if task:
                yield task, row['language'], exchanges[:n], question, answer


@torch.inference_mode()
def answers(model, tok, prompts, end, device, most):
    """Return the model's answers, up to the end mark, to prompts (B lists of ids of one length), by greedy choice.

    most: tokens to write; an answer that is longer is cut.
    """
    idx = torch.tensor(prompts, device=device)  # (B, T)
    cache, rows = KVCache(model.config, len(prompts), device, model.dtype), []
    if idx.size(1) > model.config.block_size:
        return [''] * len(prompts)  # the model cannot read the question
    for _ in range(min(most, model.config.block_size - idx.size(1) + 1)):
        logits, _ = model(idx, cache=cache)
        idx = logits[:, -1, :tok.vocab_size].argmax(-1, keepdim=True)  # (B, 1)
        rows.append(idx)
        if len(rows) % 8 == 0 and all(end in tok.decode(row) for row in torch.cat(rows, 1).cpu()):
            break
    return [tok.decode(row).split(end)[0] for row in torch.cat(rows, 1).cpu()]


def main(argv=None):
    settings = configure(globals(), argv, early={'device': devices.pick_device},
                         check=lambda s: list(filter(None, [devices.device_problem(s['device'])])))
    model, tok, state = load_model('resume', out_dir)
    model, marks = model.to(settings['device']), state.get('chat')
    if not marks:
        raise UserError(f'{out_dir} was not trained on dialogues: it has no marks for questions and answers')
    asked, right, wrong, by_length = Counter(), Counter(), [], {}
    for task, language, before, question, truth in questions(held_out()):
        ids = dialogue.prompt_ids(tok, '', before, question, marks)
        by_length.setdefault(len(ids), []).append((f'{task:<9}{language}', question, truth, ids))
    print(f'asking {sum(map(len, by_length.values())):,} questions', flush=True)
    for group in log.progress(by_length.values(), len(by_length), 'lengths of questions'):
        most = max(len((truth + marks['end']).encode()) for _, _, truth, _ in group)  # a token has at least one byte
        found = answers(model, tok, [ids for *_, ids in group], marks['end'], settings['device'], most)
        for (kind, question, truth, _), answer in zip(group, found, strict=True):
            asked[kind] += 1
            right[kind] += answer == truth
            wrong += [f'{question} {answer}  (expected {truth})'] * (answer != truth)
    for kind in sorted(asked):
        print(f'{kind}  {right[kind]:,} of {asked[kind]:,} ({right[kind] / asked[kind]:.2%})')
    print(f'all  {right.total():,} of {asked.total():,} ({right.total() / asked.total():.2%})')
    print('\n'.join(wrong[::max(1, len(wrong) // max(1, show))][:show]))


if __name__ == '__main__':
    main()
