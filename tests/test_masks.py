"""Questions and answers all the way: rows, masks, windows, training, chat and export."""
import hashlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
from kit import Ranks, differences, load, trained_part

from configurator import REPO, UserError
from lib.text import dialogue, read_text
from lib.text import prepare as prepare_room
from lib.text.dataset import Dialogues, Split, eval_starts, open_dataset, split_batches, train_starts
from lib.text.tokenizer import from_spec
from model import GPT, GPTConfig

if (shared := REPO.parent / 'shared' / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(shared))

SIZES = [5, 60, 9, 31, 14, 22, 7, 45, 11, 18]  # characters of questions


def rows(n=60):
    """Rows in the shape of messages: one exchange, or two, with a system text now and then."""
    found = []
    for i in range(n):
        turns = [('user', 'q' * SIZES[i % 10] + str(i)), ('assistant', f'answer {i * i}')] * (1 + i % 2)
        if i % 5 == 0:
            turns = [('system', 'be kind'), *turns]
        found.append({'messages': [{'role': role, 'content': text} for role, text in turns]})
    return found


def put(path, records):
    path.write_text(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records), encoding='utf-8')
    return path


@pytest.fixture
def prepare(tmp_path, monkeypatch, capfd):
    """prepare(records or path, *flags) prepares them as data/rows of a scratch repository; returns that folder."""
    monkeypatch.chdir(tmp_path)

    def prepare(records, *flags):
        path = put(tmp_path / 'rows.jsonl', records) if isinstance(records, list) else records
        monkeypatch.setattr(sys, 'argv', ['prepare.py', f'--input={path}', '--name=rows', *flags])
        capfd.readouterr()
        prepare_room.prepare(tmp_path / 'data' / 'text' / 'prepare.py')
        prepare.out, prepare.err = capfd.readouterr()
        return tmp_path / 'data' / 'rows'
    return prepare


@pytest.fixture
def refused(prepare, capfd):
    """refused(...) is the one line with which prepare(...) ends."""
    def refused(*args):
        with pytest.raises(SystemExit) as end:
            prepare(*args)
        message = end.value.code if isinstance(end.value.code, str) else capfd.readouterr().err.strip()
        assert '\n' not in message
        return message
    return refused


def meta(folder):
    return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))


def contents(folder, split='train'):
    """Return (tokenizer, ids, mask) of a split."""
    facts = meta(folder)
    mask = np.fromfile(folder / f'{split}.mask', np.uint8)
    return from_spec(facts['tokenizer']), np.fromfile(folder / f'{split}.bin', facts['dtype']), mask


def learned(folder, split='train'):
    """Return the text of the targets."""
    tok, ids, mask = contents(folder, split)
    return tok.decode(ids[mask == 1])


# prepare

def test_answers_and_their_end_marks_are_the_targets(prepare):
    folder = prepare([{'prompt': 'How?', 'completion': 'So.'}] * 30)
    tok, ids, mask = contents(folder)
    assert tok.decode(ids) == 'Q:\nHow?\n\nA:\nSo.\n\n\n' * 27 and learned(folder) == 'So.\n\n' * 27
    assert set(mask.tolist()) == {0, 1}
    facts = meta(folder)
    assert facts['chat'] == {'user': 'Q:\n', 'assistant': '\n\nA:\n', 'end': '\n\n'}
    assert facts['splits']['train']['answer_bytes'] == 27 * 3 and facts['splits']['train']['n_bytes'] == 27 * 7


@pytest.mark.parametrize('flags', [['--tokenizer=byte'], ['--tokenizer=gpt2'], ['--tokenizer=bpe', '--vocab_size=300']])
def test_every_tokenizer_learns_the_same_text(prepare, flags):
    want = ''.join(f'{m["content"]}\n\n' for i, row in enumerate(rows()) if i % 10 != 9 for m in row['messages']
                   if m['role'] == 'assistant')
    assert learned(prepare(rows(), *flags)) == learned(prepare(rows())) == want


def test_parquet_rows_are_read_as_json_lines_are(prepare, tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows()), tmp_path / 'rows.parquet')
    from_parquet = [a.tolist() for a in contents(prepare(tmp_path / 'rows.parquet'))[1:]]
    assert from_parquet == [a.tolist() for a in contents(prepare(rows()))[1:]]


def test_hub_rows_are_read_as_json_lines_are(prepare, tmp_path):
    pytest.importorskip('datasets')
    (tmp_path / 'hub').mkdir()
    put(tmp_path / 'hub' / 'train.jsonl', rows())
    assert learned(prepare(f'hub:{tmp_path / "hub"}')) == learned(prepare(rows()))


def test_the_result_does_not_depend_on_chunks_and_processes(prepare, monkeypatch):
    whole = [a.tolist() for a in contents(prepare(rows(), '--tokenizer=gpt2', '--num_proc=1'))[1:]]
    monkeypatch.setattr(read_text, 'CHUNK', 100)
    assert whole == [a.tolist() for a in contents(prepare(rows(), '--tokenizer=gpt2', '--num_proc=2'))[1:]]


def test_rows_without_an_answer_are_left_out_and_counted(prepare):
    folder = prepare([*rows(), {'messages': [{'role': 'user', 'content': 'hello?'}]}, {'messages': []}])
    assert '2 rows without an answer were left out' in prepare.err
    tok, ids, _ = contents(folder)
    assert 'qqqqq0' in tok.decode(ids) and 'hello' not in tok.decode(ids)


def test_a_text_key_comes_first(prepare):
    folder = prepare([{'text': f'a text {i}', 'messages': []} for i in range(40)])
    assert 'chat' not in meta(folder) and not (folder / 'train.mask').exists()


def test_text_key_on_the_line_makes_text_of_rows(prepare):
    folder = prepare([{'prompt': 'a', 'completion': f'b{i}'} for i in range(40)], '--text_key=prompt,completion')
    assert 'chat' not in meta(folder)


def test_a_text_prepared_over_dialogues_leaves_no_mask_behind(prepare, tmp_path):
    assert (prepare(rows()) / 'val.mask').exists()
    (tmp_path / 'book.txt').write_text('some words\n' * 100, encoding='utf-8')
    folder = prepare(tmp_path / 'book.txt')
    assert sorted(path.name for path in folder.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


def test_what_prepare_refuses(refused, tmp_path):
    assert 'has 3 dialogues with an answer' in refused(rows(3))
    assert 'belong together' in refused(rows(), '--prompt_key=title')
    assert 'rows.jsonl:41: expected messages, or prompt and completion, among text' in refused([*rows(40),
                                                                                                {'text': 'a'}])
    assert "rows.jsonl:41: role 'gpt'" in refused([*rows(40), {'messages': [{'role': 'gpt', 'content': 'a'}]}])
    assert 'rows.jsonl has no answers' in refused([{'prompt': 'a', 'completion': ''}] * 9)
    (tmp_path / 'z.txt').write_text('text', encoding='utf-8')
    put(tmp_path / 'a.jsonl', rows())
    assert 'z.txt is a text, and' in refused(tmp_path / '[az].*')


def test_a_lone_surrogate_is_named_with_its_line(refused, tmp_path):
    path = tmp_path / 'bad.jsonl'
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "\\ud800"}\n', encoding='utf-8')
    assert 'bad.jsonl:2: lone surrogate U+D800' in refused(path)


# The folder

@pytest.fixture
def data(prepare):
    prepare(rows())
    return open_dataset('rows', 128)


def test_each_split_has_its_dialogues_and_the_marks(data):
    assert len(data.train.dialogues.starts) == 54 and len(data.val.dialogues.starts) == 6
    assert data.marks == dialogue.MARKS[0]


@pytest.mark.parametrize('spoil, says', [
    (lambda f: (f / 'val.mask').unlink(), 'val.mask not found'),
    (lambda f: (f / 'train.mask').write_bytes((f / 'train.mask').read_bytes()[:-1]), 'bytes for'),
    (lambda f: (f / 'train.mask').write_bytes(b'\1' + (f / 'train.mask').read_bytes()[1:]), 'was changed since'),
])
def test_a_mask_that_does_not_belong_to_its_tokens_is_refused(prepare, spoil, says):
    spoil(prepare(rows()))
    with pytest.raises(UserError, match=says):
        open_dataset('rows', 32)


@pytest.mark.parametrize('change', [lambda m: m['chat'].pop('end'), lambda m: m.update(chat=3),
                                    lambda m: m['splits']['val'].pop('mask_sha256'),
                                    lambda m: m['splits']['val'].update(answer_bytes='7')])
def test_a_damaged_meta_json_is_refused(prepare, change):
    folder = prepare(rows())
    facts = meta(folder)
    del facts['sha256']
    change(facts)
    (folder / 'meta.json').write_text(json.dumps(facts), encoding='utf-8')
    with pytest.raises(UserError, match='meta.json is damaged'):
        open_dataset('rows', 32)


def test_a_mask_that_meta_json_does_not_mention_is_refused(workdir):
    (workdir / 'data' / 'tiny' / 'train.mask').write_bytes(bytes(2000))
    with pytest.raises(UserError, match='train.mask is not mentioned in meta.json'):
        open_dataset('tiny', 8)


def test_masks_are_part_of_the_fingerprint(prepare):
    prepare(rows())
    before = open_dataset('rows', 128).fingerprint()
    folder = prepare(rows())
    assert open_dataset('rows', 128).fingerprint() == before
    facts, mask = meta(folder), np.fromfile(folder / 'train.mask', np.uint8)
    mask[1] = 1
    facts['splits']['train']['mask_sha256'] = hashlib.sha256(mask.tobytes()).hexdigest()
    del facts['sha256']
    mask.tofile(folder / 'train.mask')
    (folder / 'meta.json').write_text(json.dumps(facts), encoding='utf-8')
    assert open_dataset('rows', 128).fingerprint() != before


def test_a_mapped_folder_reads_as_one_in_memory(data, monkeypatch):
    from lib.text import data_folder
    monkeypatch.setattr(data_folder, 'IN_MEMORY', 0)
    mapped = open_dataset('rows', 32)
    assert isinstance(mapped.train.mask, np.memmap)
    starts = data.train.dialogues.starts
    assert all(torch.equal(a, b) for a, b in zip(mapped.train.batch(starts, 32), data.train.batch(starts, 32)))


# Windows

def order(data, first, count, seed=1):
    return train_starts(seed, len(data.train), 128, first, count, data.train.dialogues)


def test_every_dialogue_is_read_once_per_epoch_and_every_epoch_in_another_order(data):
    epochs = [order(data, e * 54, 54) for e in range(5)]
    assert all(sorted(epoch) == data.train.dialogues.starts.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert (order(data, 0, 54, seed=2) != epochs[0]).any()


def test_the_order_does_not_depend_on_how_it_is_asked_for(data):
    whole = order(data, 0, 200)
    parts = [order(data, first, count) for first, count in ((0, 7), (7, 150), (157, 43))]
    assert (np.concatenate(parts) == whole).all() and set(whole) <= set(data.train.dialogues.starts)


@pytest.mark.parametrize('block_size', [16, 32, 200])
def test_a_window_has_one_dialogue_from_its_beginning_and_its_answers_as_targets(data, block_size):
    tok, ids, mask = contents(data.train.path.parent)
    for start, end in zip(data.train.dialogues.starts, data.train.dialogues.ends):
        idx, targets = data.train.batch(np.array([start]), block_size)
        n = min(block_size, end - start)
        assert tok.decode(idx[0, :n]) == tok.decode(ids[start:start + n])
        # whatever is read after the end of the dialogue is not a target
        want = np.where(mask[start + 1:start + n + 1] == 1, ids[start + 1:start + n + 1].astype(int), -1)
        assert targets[0].tolist() == want.tolist() + [-1] * (block_size - n)
        assert (idx[0, n:] == ids[end]).all()


def test_what_does_not_fit_is_cut_and_counted(prepare):
    prepare([{'prompt': 'q', 'completion': 'a' * (10 * i + 1)} for i in range(20)])
    data = open_dataset('rows', 32)
    tok, ids, mask = contents(data.train.path.parent)
    read = {start + 1 + int(i) for start in data.train.dialogues.starts
            for i in np.flatnonzero(data.train.batch(np.array([start]), 32)[1][0] != -1)}
    assert data.train.dialogues.n_lost == mask.sum() - len(read) > 0
    lengths = [len(f'Q:\nq\n\nA:\n{"a" * (10 * i + 1)}\n\n') for i in range(20) if i % 10 != 9]
    assert data.train.dialogues.n_cut == sum(length > 33 for length in lengths)
    assert f'{data.train.dialogues.n_cut} are longer and are cut there' in data.train.describe(32)


def test_a_dialogue_whose_answers_do_not_fit_has_no_window(prepare):
    prepare([{'prompt': 'q' * (1 if i % 3 else 40), 'completion': 'a'} for i in range(40)])
    found = open_dataset('rows', 32).train.dialogues
    assert (len(found.starts), found.n_unused) == (24, 12)
    with pytest.raises(UserError, match=r'no dialogue in .*train.bin has an answer within block_size=4'):
        open_dataset('rows', 4)


def test_a_dialogue_with_a_single_target_in_its_window_is_read(prepare):
    prepare([{'prompt': 'q', 'completion': 'abc'}] * 30)
    assert open_dataset('rows', 9).train.dialogues.n_targets.tolist() == [1] * 27  # the question has 9 characters


def test_how_full_the_windows_are_is_counted():
    where = Dialogues(np.array([0, 31]), np.array([30, 41]), np.array([3, 4]), 0, 0, 0)
    split = Split(None, np.arange(42), 0, '', 42, np.ones(42, np.uint8), where)
    assert split.epoch_tokens(20) == 40  # two windows
    assert split.describe(20) == 'dialogues: 2, one per window of 20 tokens, which are 75% full'  # (20 + 10) / 40
    where.n_cut, where.n_unused, where.n_lost = 1, 2, 5
    assert split.describe(20).endswith('; 1 are longer and are cut there, 2 more have no answer there: 5 of 42 targets '
                                       'are not read')


def test_a_prompt_is_a_dialogue_up_to_its_first_answer(data):
    tok, _, _ = contents(data.train.path.parent)
    want = f'be kind\n\nQ:\n{rows()[0]["messages"][1]["content"]}\n\nA:\n'
    assert tok.decode(data.val.prompt(0)).startswith('Q:\n') and tok.decode(data.val.prompt(0)).endswith('\n\nA:\n')
    assert tok.decode(data.train.prompt(0)) == want == tok.decode(data.train.prompt(54))
    assert data.train.prompt(1) == data.train.prompt(55) != data.train.prompt(0)


@pytest.mark.parametrize('most, n', [(128 * 3, 3), (5, 1), (128 * 1000, 54)])
def test_max_targets_reads_dialogues_spread_evenly(prepare, most, n):
    prepare(rows())
    split = open_dataset('rows', 128).train
    read = [tuple(row) for idx, _ in split_batches(split, 128, 2, max_targets=most) for row in idx.tolist()]
    ids = split.batch(split.dialogues.starts, 128)[0].tolist()
    assert len(read) == n and read[0] == tuple(ids[0]) and read[-1] == tuple(ids[-1 if n > 1 else 0])


def test_a_split_of_just_max_targets_is_read_whole(prepare):
    prepare(rows())
    split = open_dataset('rows', 128).train
    assert sum(len(idx) for idx, _ in split_batches(split, 128, 2, max_targets=len(split) - 1)) == 54
    assert sum(len(idx) for idx, _ in split_batches(split, 128, 2, max_targets=len(split) - 2)) < 54


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_a_pass_over_a_split_has_every_target_once(data, world_size):
    batches = [pair for rank in range(world_size) for pair in split_batches(data.train, 200, 4, rank, world_size)]
    assert sum(int((targets != -1).sum()) for _, targets in batches) == data.train.n_targets
    tok, ids, mask = contents(data.train.path.parent)
    found = np.concatenate([t.numpy()[t.numpy() != -1] for _, t in batches])
    assert (np.bincount(found) == np.bincount(ids[mask == 1])).all()


def test_evaluation_windows_are_dialogues_spread_evenly(data):
    at = eval_starts(len(data.train), 128, 3, 4, data.train.dialogues)
    assert at.shape == (3, 4) and at[0, 0] == 0 and at[-1, -1] == data.train.dialogues.starts[-1]
    assert set(at.ravel()) <= set(data.train.dialogues.starts)


def test_weights_are_each_parts_fraction_of_the_targets(data):
    starts = data.train.dialogues.starts[:12]
    counts = [int((data.train.batch(part, 128)[1] != -1).sum()) for part in starts.reshape(3, 4)]
    assert np.allclose(data.train.weights(starts, 3), np.array(counts) / np.mean(counts)) and len(set(counts)) > 1


def test_without_a_mask_the_weights_are_exactly_1(workdir):
    assert open_dataset('tiny', 8).train.weights(np.arange(12), 3).tolist() == [1, 1, 1]


# The loss

def small_model(data, block_size=64):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=data.vocab_size, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_the_gradient_at_masked_positions_is_exactly_0(prepare):
    prepare(rows())
    data = open_dataset('rows', 64)
    model, kept = small_model(data), {}
    idx, targets = data.train.batch(data.train.dialogues.starts[:8], 64)

    def keep(module, inputs, output):
        output.retain_grad()
        kept['x'] = output
    model.transformer.ln_f.register_forward_hook(keep)  # what the scores of each position are computed from
    model(idx, targets)[1].backward()
    nonzero = (kept['x'].grad != 0).any(-1)
    assert torch.equal(nonzero, targets != -1) and 0 < nonzero.sum() < nonzero.numel()


def test_a_batch_has_the_loss_and_gradients_of_its_dialogues_apart(prepare):
    prepare(rows())
    data = open_dataset('rows', 64)
    model, starts = small_model(data), data.train.dialogues.starts[:6]
    model(*data.train.batch(starts, 64))[1].backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0
    for start, end in zip(starts, data.train.dialogues.ends):
        idx, targets = data.train.batch(np.array([start]), min(64, int(end - start)))  # nothing but this dialogue
        n = int((targets != -1).sum())
        total += n
        (model(idx, targets)[1] * n).backward()
    assert all(torch.allclose(a, p.grad / total, atol=1e-6) for a, p in zip(together, model.parameters()))


def test_bits_per_byte_are_of_the_answers(data):
    n_bytes = len(learned(data.val.path.parent, 'val').replace('\n\n', '').encode())
    assert data.val.n_bytes == n_bytes
    assert np.isclose(data.val.bits_per_byte(2.0), 2.0 * data.val.n_targets / np.log(2) / n_bytes)


# Training

FLAGS = [*TINY, '--dataset=rows', '--block_size=64', '--dropout=0.2', '--gradient_accumulation_steps=2',
         '--lr_decay_iters=6', '--eval_interval=2']


@pytest.mark.parametrize('flags', [[], ['--optimizer=muon']])
def test_six_steps_equal_three_and_three_more_bit_for_bit(run, prepare, flags):
    prepare(rows())
    assert run('train.py', *FLAGS, *flags, '--out_dir=whole').status == 0
    run('train.py', *FLAGS, *flags, '--out_dir=halves', '--max_iters=3')
    done = run('train.py', *FLAGS, *flags, '--out_dir=halves', '--init_from=resume')
    assert done.status == 0, done.err
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('halves/last.pt'))) == []


def test_micro_batches_with_different_numbers_of_targets_add_up_to_the_whole_batch(run, prepare):
    prepare(rows())
    exact = [*FLAGS, '--dropout=0', '--max_iters=3', '--grad_clip=0']
    run('train.py', *exact, '--batch_size=8', '--gradient_accumulation_steps=1', '--out_dir=one')
    run('train.py', *exact, '--batch_size=2', '--gradient_accumulation_steps=4', '--out_dir=four')
    one, four = load('one/last.pt')['model'], load('four/last.pt')['model']
    assert all(torch.allclose(one[name], four[name], atol=1e-5) for name in one)
    losses = [[json.loads(line)['loss'] for line in open(f'{out}/log.jsonl', encoding='utf-8') if '"loss"' in line]
              for out in ('one', 'four')]
    assert np.allclose(*losses, atol=1e-5)


def test_two_ranks_train_as_one(run, prepare, tmp_path):
    prepare(rows())
    exact = [*FLAGS, '--dropout=0', '--gradient_accumulation_steps=4', '--max_iters=4']
    assert run('train.py', *exact, '--out_dir=one').status == 0
    outcomes = Ranks(2, 'train.py', *exact, '--out_dir=two', cwd=tmp_path).wait()
    assert [status for status, _, _ in outcomes] == [0, 0], [err for _, _, err in outcomes]
    one, two = load('one/last.pt'), load('two/last.pt')
    assert all(torch.allclose(one['model'][name], two['model'][name], atol=1e-5) for name in one['model'])
    assert np.allclose(one['history'], two['history'], atol=1e-5)


def test_short_contexts_are_not_used_with_dialogues(run, prepare):
    prepare(rows())
    done = run('train.py', *FLAGS, '--context_warmup=0.6', '--out_dir=out')
    assert done.status == 0 and 'context:' not in done.out and 'dialogues: 48, one per window' in done.out


def test_the_final_loss_is_that_of_evaluate_and_of_eval_only(run, prepare):
    prepare(rows())
    trained = run('train.py', *FLAGS, '--out_dir=out', '--always_save_checkpoint=True')
    last = [line for line in trained.out.splitlines() if line.startswith('step 6')][0]
    again = run('train.py', *FLAGS, '--out_dir=out', '--init_from=resume', '--eval_only=True')
    assert last in again.out.splitlines()
    loss, bpb = last.split('val loss ')[1].split(', val bpb ')
    line = run('evaluate.py', '--out_dir=out', '--device=cpu', '--dtype=float32').out.splitlines()[-1]
    assert f'loss {loss},' in line and f'bpb {bpb} ' in line


def test_samples_in_the_log_answer_a_question_of_the_validation_split(run, prepare):
    prepare(rows())
    done = run('train.py', *FLAGS, '--out_dir=out', '--sample_interval=1')
    assert done.status == 0 and done.out.count('    | Q:\n    | qqq') == 4  # after 0, 2, 4 and 6 updates
    assert run('plot.py', 'out').status == 0


def test_adapters_are_trained_on_answers(run, prepare):
    prepare(rows())
    assert run('train.py', *FLAGS, '--out_dir=base', '--max_iters=2').status == 0
    done = run('train.py', *FLAGS, '--init_from=base', '--lora_rank=2', '--out_dir=adapted')
    assert done.status == 0, done.err
    assert load('adapted/ckpt.pt')['chat'] == dialogue.MARKS[0]


# Chat

def test_a_chat_answers_once_and_prints_only_the_answer(run, prepare):
    prepare(rows())
    assert run('train.py', *FLAGS, '--out_dir=out').status == 0
    assert load('out/ckpt.pt')['chat'] == dialogue.MARKS[0]
    done = run('sample.py', '--chat', '--start=qqq1', '--device=cpu', '--max_new_tokens=5', '--temperature=0')
    assert done.status == 0, done.err
    again = run('sample.py', '--chat', '--start=FILE:q.txt', '--device=cpu')
    assert again.status in (1, 2) and 'q.txt' in again.last_error
    assert '---' not in done.out and 'Q:' not in done.out


def test_a_model_of_text_is_told_what_a_chat_needs(run, workdir):
    assert run('train.py', *TINY, '--max_iters=2').status == 0
    done = run('sample.py', '--chat', '--start=a', '--device=cpu')
    assert done.status in (1, 2) and 'trained on questions and answers' in done.last_error


def test_rows_as_baike2018qa_has_them_go_through_prepare_train_and_chat(run, prepare, tmp_path, monkeypatch):
    """A model that has memorised five questions answers them."""
    pairs = [('天空是什么颜色', '蓝色的。'), ('雪是什么颜色', '白色的。'), ('一加一等于几', '等于二。'),
             ('水在哪里', '在河里。\n也在海里。'), ('谁写了西游记', '吴承恩。')]
    records = [{'qid': f'qid_{i}', 'category': '教育', 'title': pairs[i % 5][0], 'answer': pairs[i % 5][1],
                'desc': '' if i % 3 else pairs[i % 5][0]} for i in range(50)]
    folder = prepare(records, '--prompt_key=title,desc', '--answer_key=answer')
    assert learned(folder).startswith('蓝色的。\n\n白色的。\n\n')
    done = run('train.py', *TINY, '--dataset=rows', '--block_size=48', '--n_embd=32', '--batch_size=16',
               '--max_iters=120', '--eval_interval=120', '--warmup_iters=10')
    assert done.status == 0, done.err
    for question, answer in pairs:
        said = run('sample.py', '--chat', f'--start={question}', '--temperature=0', '--device=cpu')
        assert said.out == f'{answer}\n'


# From a run that was trained on text

def test_a_run_is_taught_to_answer(run, prepare, tmp_path):
    (tmp_path / 'book.txt').write_text('Q: what? A: nothing.\nanswer be kind 0123456789 q\n' * 50, encoding='utf-8')
    folder = prepare(tmp_path / 'book.txt', '--tokenizer=byte')
    assert run('train.py', *TINY, '--dataset=rows', '--block_size=64', '--out_dir=base').status == 0
    prepare(rows(), '--tokenizer=byte')
    done = run('train.py', *FLAGS, '--init_from=base', '--out_dir=taught', '--n_layer=2')
    assert done.status == 0, done.err
    assert load('taught/ckpt.pt')['model_args'] == {**load('base/ckpt.pt')['model_args'], 'dropout': 0.2}
    assert 'chat' in meta(folder) and run('sample.py', '--init_from=taught', '--chat', '--start=a', '--device=cpu',
                                          '--max_new_tokens=3').status == 0


# Export

@pytest.mark.parametrize('kind', ['char', 'gpt2'])
def test_transformers_writes_a_conversation_with_the_same_tokens(run, prepare, kind):
    transformers = pytest.importorskip('transformers')
    prepare(rows(), f'--tokenizer={kind}')
    assert run('train.py', *FLAGS, '--out_dir=out', '--max_iters=2').status == 0
    done = run('export.py', '--out_dir=out', '--to=hf')
    assert done.status == 0, done.err
    theirs, tok = transformers.AutoTokenizer.from_pretrained('hf'), from_spec(load('out/ckpt.pt')['tokenizer'])
    said = [{'role': 'system', 'content': 'be kind'}, {'role': 'user', 'content': 'qq1'},
            {'role': 'assistant', 'content': ' answer 4\n'}, {'role': 'user', 'content': 'qqq2'}]
    ours = dialogue.prompt_ids(tok, 'be kind', [('qq1', 'answer 4')], 'qqq2', dialogue.MARKS[0])
    made = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=True)['input_ids']
    assert made == ours
    answered = theirs.apply_chat_template([*said, {'role': 'assistant', 'content': 'answer 9'}], tokenize=False)
    assert answered == tok.decode(ours) + 'answer 9\n\n'


def test_an_exported_model_chats(run, prepare):
    prepare(rows())
    assert run('train.py', *FLAGS, '--out_dir=out', '--max_iters=2').status == 0
    assert run('export.py', '--out_dir=out', '--to=hf').status == 0
    said = [run('sample.py', *where, '--chat', '--start=q', '--device=cpu', '--max_new_tokens=9').out
            for where in (['--init_from=hf'], ['--out_dir=out'])]
    assert said[0] == said[1] != ''
