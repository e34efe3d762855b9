"""play.py's server: what it computes, against sample.py and evaluate.py; whom it refuses; what is never read.

The page itself is tested in a browser, in test_play_browser.py.
"""
import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, write_dataset

from configurator import UserError
from lib import generate
from lib.play import attention, curves, models, server, views, worker
from lib.text import tokenizer
from model import GPT, GPTConfig

CHARS = '\n abcdefgh人之初性本善\U0001f600'
MODERN = dict(pos='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, tie_weights=False, smear=True, bias=False)
CPU = SimpleNamespace(device=torch.device('cpu'), dtype=torch.float32)
MARKS = {'user': 'a\n', 'assistant': 'b\n', 'end': '\n\n'}


def write_run(folder, spec=None, seed=0, n_layer=2, n_embd=16, block_size=8, **more):
    """Write a random model's ckpt.pt into `folder`; return it. more: the model's options, or the checkpoint's keys."""
    keys = {name: more.pop(name) for name in ('chat', 'config', 'iter_num', 'best_val_loss') if name in more}
    spec = spec or {'kind': 'char', 'chars': CHARS}
    V = tokenizer.from_spec(spec).vocab_size
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=V, n_layer=n_layer, n_head=2, n_embd=n_embd, **more))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    state = {'model': model.state_dict(), 'model_args': model.config.model_args(), 'iter_num': 4, 'best_val_loss': 1.0,
             'config': {'dataset': 'gone'}, 'tokenizer': spec, **keys}
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / 'new.pt')
    os.replace(folder / 'new.pt', folder / 'ckpt.pt')
    return model.eval()


class Played:
    """A server in this process, and requests to it."""

    def __init__(self, *names, **site):
        self.models = models.Models(names, '', CPU)
        self.server = server.Server(server.Site(self.models, **site), 0)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()

    def raw(self, method, path, body=b'', **headers):
        """Return (status, headers, body) of a request."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=20)
        with contextlib.closing(connection):
            headers = {'Content-Type': 'application/json', **headers} if method == 'POST' else headers
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def ask(self, kind, **body):
        """Return the lines of an answer; UserError with the message where it is refused."""
        status, _, raw = self.raw('POST', f'/api/{kind}', json.dumps({'model': 'out', **body}).encode())
        lines = [json.loads(line) for line in raw.splitlines()]
        if status != 200:
            raise UserError(lines[0]['error'])
        return lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def play(folder):
    """play('out', ...) serves run folders in this process; the servers stop with the test."""
    started = []

    def play(*names, **site):
        started.append(Played(*names, **site))
        return started[-1]
    yield play
    for played in started:
        played.server.shutdown()
        played.server.server_close()


# what it computes

RULES = [{}, {'temperature': 0.5}, {'top_k': 3}, {'top_p': 0.6}, {'top_k': 6, 'top_p': 0.5, 'temperature': 1.7},
         {'repetition_penalty': 1.6}, {'repetition_penalty': 1.3, 'top_k': 4}, {'temperature': 0}]


@pytest.mark.parametrize('rules', RULES)
def test_bars_are_the_probabilities_that_tokens_are_drawn_with(play, folder, rules):
    model = write_run(folder / 'out')
    rules = {'temperature': 1.0, **rules}
    answer, = play('out').ask('next', prompt='abc人', **rules)
    ids = torch.tensor([[CHARS.index(c) for c in 'abc人']])
    logits = model(ids)[0][:, -1].expand(40_000, -1)
    seen = torch.zeros(1, len(CHARS), dtype=torch.bool).scatter_(1, ids, True)
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(0))
    drawn = generate.sample_next_token(logits, uniform, seen, **rules)
    share = torch.bincount(drawn, minlength=len(CHARS)) / len(drawn)
    assert max(abs(bar['p'] - share[bar['id']]) for bar in answer['bars']) < 0.012
    assert all(share[bar['id']] == 0 for bar in answer['bars'] if bar['p'] == 0)


@pytest.mark.parametrize('rules', RULES)
def test_bars_and_the_rest_sum_to_one(play, folder, rules):
    write_run(folder / 'out', {'kind': 'byte'})
    answer, = play('out').ask('next', prompt='abc人', **rules)
    assert len(answer['bars']) == 20 and answer['rest']['count'] == 236
    for part in ('p', 'before'):
        assert sum(bar[part] for bar in answer['bars']) + answer['rest'][part] == pytest.approx(1, abs=1e-5)


def test_bars_name_the_rule_that_cuts_a_token(play, folder):
    write_run(folder / 'out')
    answer, = play('out').ask('next', prompt='abc', temperature=1, top_k=6, top_p=0.5)
    cut = [bar['cut'] for bar in answer['bars']]
    kept = cut.count('')
    assert 0 < kept < 6 and cut[kept:] == ['top_p'] * (6 - kept) + ['top_k'] * (len(CHARS) - 6)


def written(lines):
    """Return (text, ids) of an answer to `write`."""
    pieces = [piece for line in lines for piece in line.get('pieces', ())]
    return ''.join(text for text, _ in pieces), [token[0] for _, tokens in pieces for token in tokens]


@pytest.mark.parametrize('rules', [{}, {'top_k': 4, 'temperature': 1.3}, {'top_p': 0.8, 'repetition_penalty': 1.2}])
@pytest.mark.parametrize('spec', [None, {'kind': 'byte'}])
def test_written_text_is_sample_pys_with_the_same_seed(run, play, folder, spec, rules):
    write_run(folder / 'out', spec)
    rules = {'temperature': 0.8, 'top_k': 200, **rules}
    text, _ = written(play('out').ask('write', prompt='a人', seed=7, max_new_tokens=40, **rules))
    flags = [f'--{name}={value}' for name, value in rules.items()]
    done = run('sample.py', '--device=cpu', '--dtype=float32', '--num_samples=1', '--max_new_tokens=40', '--seed=7',
               '--start=a人', *flags)
    assert done.out == f'a人{text}\n{"-" * 15}\n'


def test_written_tokens_are_generates_and_their_probabilities_the_bars(play, folder):
    model = write_run(folder / 'out')
    rules = {'temperature': 0.9, 'top_k': 5, 'repetition_penalty': 1.2}
    played = play('out')
    lines = played.ask('write', prompt='ab', seed=3, max_new_tokens=6, **rules)
    _, ids = written(lines)
    prompt = [CHARS.index(c) for c in 'ab']
    expected = generate.generate(model, prompt, 1, 6, valid_vocab=len(CHARS), seed=3, **rules)
    assert ids == [int(i) for i in expected]
    tokens = [token for line in lines for _, own in line.get('pieces', ()) for token in own]
    for place, (i, p, others) in enumerate(tokens):
        bars = {bar['id']: bar for bar in played.ask('next', prompt='ab', after=ids[:place], **rules)[0]['bars']}
        assert p == pytest.approx(bars[i]['p'], abs=2e-4)
        assert [other[0] for other in others] == list(bars)[:views.OTHERS]
        assert [other[3] for other in others] == pytest.approx([bars[other[0]]['p'] for other in others], abs=2e-4)


def test_a_text_is_continued_after_tokens_that_the_reader_chose(play, folder):
    model = write_run(folder / 'out')
    text, ids = written(play('out').ask('write', prompt='ab', after=[16, 3], seed=3, max_new_tokens=5))
    expected = generate.generate(model, [2, 3, 16, 3], 1, 5, valid_vocab=len(CHARS), seed=3, temperature=0.8)
    assert ids == [16, 3, *(int(i) for i in expected)] and text.startswith('\U0001f600b')


def test_bytes_of_one_character_are_one_piece_and_half_a_character_at_the_end_is_left_out():
    tok = SimpleNamespace(eot=None, decode_bytes=bytes)
    pieces = views.Pieces(SimpleNamespace(tok=tok))
    found = [pieces.add(i, i) for i in 'a\U0001f600人'.encode()[:-1]]
    assert [piece for piece in found if piece] == [('a', [97]), ('\U0001f600', [0xf0, 0x9f, 0x98, 0x80])]
    assert pieces.rest() == ('�', [0xe4, 0xba])


@pytest.mark.parametrize('length', [2, 9, 10, 25, 61])
def test_bits_per_byte_of_a_text_are_evaluate_pys(run, play, folder, length):
    write_run(folder / 'out')
    text = ('abc人之\U0001f600h' * 10)[:length]
    (folder / 'text.txt').write_text(text, encoding='utf-8')
    done = run('evaluate.py', '--device=cpu', '--dtype=float32', '--text=text.txt', '--stride=4')
    totals = play('out').ask('read', text=text)[-1]['done']
    assert f'{totals["bpb"]:.4f}' == re.search(r'bpb ([\d.]+)', done.out)[1]


def test_surprise_is_the_negative_logarithm_of_a_tokens_probability(play, folder):
    model = write_run(folder / 'out', {'kind': 'byte'})
    lines = play('out').ask('read', text='a人b')
    pieces = [piece for line in lines for piece in line.get('pieces', ())]
    assert [text for text, _ in pieces] == ['a', '人', 'b']
    ids = list('a人b'.encode())
    logits = model(torch.tensor([ids]), torch.tensor([ids]), return_logits=True)[0][0].detach()
    expected = [None, *(round(float(-logits[t].log_softmax(-1)[i] / np.log(2)), 3) for t, i in enumerate(ids[1:]))]
    assert [bits for _, tokens in pieces for _, bits in tokens] == pytest.approx(expected, abs=2e-3)


def test_a_text_of_twenty_thousand_characters_is_read_whole(play, folder):
    write_run(folder / 'out', block_size=64)
    text = ('abc人之\U0001f600 h\n' * 2500)[:20_000]
    lines = play('out').ask('read', text=text)
    assert ''.join(text for line in lines for text, _ in line.get('pieces', ())) == text


def test_characters_that_a_model_lacks_are_named_and_can_be_left_out(play, folder):
    write_run(folder / 'out')
    played = play('out')
    with pytest.raises(UserError, match='character .*Z.* is not in this model'):
        played.ask('read', text='abZc')
    assert played.ask('read', text='abZc', drop=True)[-1]['done']['bytes'] == 3


@pytest.mark.parametrize('options', [{}, MODERN])
def test_attention_rows_sum_to_one_and_see_no_future(play, folder, options):
    write_run(folder / 'out', **options)
    answer, = play('out').ask('look', text='abc人之初h', layer=1, head=1)
    rows = np.frombuffer(base64.b64decode(answer['weights']), '<f4').reshape(7, 7)
    assert rows.sum(1) == pytest.approx(np.ones(7), abs=1e-5) and not np.triu(rows, 1).any()
    assert answer['tokens'] == list('abc人之初h')


@pytest.mark.parametrize('options', [{}, MODERN, {'window': 3}])
@torch.inference_mode()
def test_recomputed_attention_gives_what_the_layer_gave(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_embd=16, **options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    given = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda attn, args, out: given.append((attn, args[0], out)))
    found = attention.weights(model, [3, 1, 4, 1, 5, 9, 2])
    assert len(given) == 2
    for weights, (attn, x, out) in zip(found, given):
        v = attn.c_attn(x)[0, :, 32:].view(7, 2, 8).transpose(0, 1)  # (nh, T, hs)
        mixed = (weights @ v).transpose(0, 1).reshape(7, 16)
        torch.testing.assert_close(attn.c_proj(mixed), out[0], rtol=1e-4, atol=1e-5)


def test_attention_is_shown_for_as_many_tokens_as_the_model_reads(play, folder):
    write_run(folder / 'out')
    answer, = play('out').ask('look', text='abcdefgh' * 3)
    assert len(answer['tokens']) == 8 and answer['left_out'] == 16


def test_the_conversation_is_that_of_sample_pys_chat(play, folder, run, monkeypatch):
    write_run(folder / 'out', chat=MARKS, block_size=64)
    played, turns = play('out'), []
    asked = ['c', 'e人', 'h', 'gg']
    typed = io.TextIOWrapper(io.BytesIO('\n'.join(asked).encode('utf-8')), encoding='utf-8')
    monkeypatch.setattr(sys, 'stdin', typed)
    done = run('sample.py', '--chat', '--device=cpu', '--dtype=float32', '--max_new_tokens=12', '--seed=5')
    answers = []
    for question in asked:
        turns.append(['user', question])
        lines = played.ask('chat', turns=turns, seed=5, max_new_tokens=12, temperature=0.8, top_k=200)
        answers.append(''.join(line.get('text', '') for line in lines))
        turns.append(['assistant', answers[-1]])
    assert done.status == 0 and ''.join(answer + '\n' for answer in answers) == done.out.removesuffix('\n')


def test_a_model_without_dialogue_marks_has_no_conversation(play, folder):
    write_run(folder / 'out')
    played = play('out')
    assert not played.ask('next', prompt='a')[0].get('chat') and not played.models.describe()[0]['chat']
    with pytest.raises(UserError, match='trained on questions and answers'):
        played.ask('chat', turns=[['user', 'c']])


def test_a_passage_comes_from_the_validation_split(play, folder):
    write_dataset(folder / 'data' / 'mine', [2] * 20, [2, 3, 4, 5, 6, 7, 8, 9] * 4, chars=CHARS)
    write_run(folder / 'out', config={'dataset': 'mine'})
    assert play('out').ask('passage', place=0.5, tokens=8) == [{'text': 'efghabcd'}]


def test_a_passage_begins_with_a_line_if_one_is_near(play, folder):
    write_dataset(folder / 'data' / 'mine', [2] * 20, [2, 3, 4, 0, 5, 6, 7, 8] * 4, chars=CHARS)
    write_run(folder / 'out', config={'dataset': 'mine'})
    assert play('out').ask('passage', place=0.5, tokens=16) == [{'text': 'defgabc\ndefg'}]


@pytest.mark.slow
def test_streaming_reaches_nine_tenths_of_sample_pys_speed(folder):
    write_run(folder / 'out', {'kind': 'byte'}, block_size=256, n_layer=4, n_embd=128)
    opened, rules = models.Models(['out'], '', CPU).get('out'), {'temperature': 0.8, 'top_k': 200}

    def seconds(work):  # of the CPU, because other programs may run
        began = time.process_time()
        for item in work:
            json.dumps(item)
        return time.process_time() - began
    both = [(seconds(generate.generate_text(opened.model, opened.tok, [10], 1, 1000, seed=seed, **rules)),
             seconds(views.write(opened, '\n', [], 1000, seed, rules))) for seed in range(5)]
    alone, streamed = map(min, zip(*both))
    assert alone / streamed > 0.9


# several readers, and a run that goes on

def test_requests_of_many_readers_are_each_answered_as_if_alone(play, folder):
    write_run(folder / 'out')
    played, got = play('out'), {}

    def read(seed):
        got[seed] = written(played.ask('write', prompt='a', seed=seed, max_new_tokens=60))
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert got == {seed: written(played.ask('write', prompt='a', seed=seed, max_new_tokens=60)) for seed in range(8)}


def slow_write(monkeypatch, state):
    """Let a `write` go on for ever, noting how many parts it made and whether it was ended."""
    def write(*args):
        try:
            while True:
                state['parts'] = state.get('parts', 0) + 1
                time.sleep(0.02)
                yield {'pieces': []}
        finally:
            state['ended'] = True
    monkeypatch.setattr(views, 'write', write)


def wait_for(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def start_writing(played):
    """Open a connection that asks for a text, as a tab does, and return it."""
    body = json.dumps({'model': 'out', 'prompt': 'a'}).encode()
    reader = socket.create_connection(('127.0.0.1', played.port))
    reader.sendall(b'POST /api/write HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'
                   b'Content-Length: %d\r\n\r\n%s' % (len(body), body))
    return reader


def test_a_closed_tab_ends_its_generation_and_the_next_reader_has_a_turn(play, folder, monkeypatch):
    write_run(folder / 'out')
    played, state = play('out'), {}
    slow_write(monkeypatch, state)
    reader = start_writing(played)
    assert wait_for(lambda: state.get('parts', 0) > 3)
    reader.close()
    assert wait_for(lambda: state.get('ended'))
    assert played.ask('next', prompt='a')[0]['bars']


def test_a_tab_that_is_closed_while_it_waits_is_never_computed(play, folder, monkeypatch):
    write_run(folder / 'out')
    played, state = play('out'), {}
    slow_write(monkeypatch, state)
    first = start_writing(played)
    assert wait_for(lambda: state.get('parts'))
    calls = []
    monkeypatch.setattr(views, 'write', lambda *args: calls.append(1) or iter(()))
    second = start_writing(played)
    waiting = played.server.site.worker.waiting
    assert wait_for(lambda: waiting.qsize() == 1)
    job = waiting.queue[0]
    second.close()
    assert wait_for(job.cancelled.is_set)
    first.close()
    assert wait_for(lambda: state.get('ended')) and played.ask('next', prompt='a') and not calls


def test_too_many_waiting_requests_are_refused_at_once(play, folder, monkeypatch):
    write_run(folder / 'out')
    played, state = play('out'), {}
    slow_write(monkeypatch, state)
    readers = [start_writing(played)]
    assert wait_for(lambda: state.get('parts'))
    readers += [start_writing(played) for _ in range(worker.MOST_WAITING)]
    assert wait_for(lambda: played.server.site.worker.waiting.full())
    with pytest.raises(UserError, match='too many requests'):
        played.ask('next', prompt='a')
    for reader in readers:
        reader.close()


def test_a_new_checkpoint_is_read_at_the_next_request(play, folder):
    write_run(folder / 'out', iter_num=100)
    played = play('out')
    before, = played.ask('next', prompt='a')
    write_run(folder / 'out', seed=1, iter_num=200)
    assert played.models.describe()[0]['changed']
    after, = played.ask('next', prompt='a')
    assert before['bars'] != after['bars'] and after['version'] > before['version']
    assert played.models.describe()[0]['iter'] == 200 and not played.models.describe()[0]['changed']


@pytest.mark.parametrize('loss, shown', [(torch.tensor(1.5), 1.5), (1e9, None)])
def test_a_loss_that_is_a_tensor_is_shown_and_one_that_was_never_measured_is_not(play, folder, loss, shown):
    write_run(folder / 'out', best_val_loss=loss)
    played = play('out')
    played.ask('next', prompt='a')
    assert played.ask('models')[0]['models'][0]['val_loss'] == shown


def test_a_damaged_checkpoint_leaves_the_model_before_it_in_place(play, folder):
    write_run(folder / 'out')
    played = play('out')
    before, = played.ask('next', prompt='a')
    (folder / 'out' / 'ckpt.pt').write_bytes(b'nothing')
    assert played.ask('next', prompt='a') == [before]
    assert 'ckpt.pt' in played.models.describe()[0]['problem']


def test_a_run_without_a_checkpoint_shows_its_curves_then_its_model(play, folder):
    (folder / 'out').mkdir()
    (folder / 'out' / 'log.jsonl').write_text('{"iter": 0, "loss": 4.5, "lr": 0.1}\n', encoding='utf-8')
    played = play('out')
    assert played.ask('curves')[0]['runs'][0]['records'] == [{'iter': 0, 'loss': 4.5, 'lr': 0.1}]
    assert not played.ask('models')[0]['models'][0]['ready']
    write_run(folder / 'out')
    assert wait_for(lambda: played.ask('models')[0]['models'][0]['ready'])


def test_curves_tell_only_what_was_appended_and_wait_for_the_end_of_a_line(folder):
    path = folder / 'log.jsonl'
    path.write_text('{"iter": 1, "loss": 3}\n{"iter": 2, "lo', encoding='utf-8')
    first = curves.appended(path, None)
    with open(path, 'a', encoding='utf-8') as file:
        file.write('ss": 2}\nbroken\n[1]\n{"step": 2, "val_loss": null, "x": 1}\n{"step": 3, "val_loss": NaN}\n')
    second = curves.appended(path, first['cursor'])
    assert first['anew'] and first['records'] == [{'iter': 1, 'loss': 3}]
    assert not second['anew'] and second['records'][0] == {'iter': 2, 'loss': 2} and second['records'][1]['step'] == 2
    assert len(second['records']) == 2


def test_curves_begin_anew_where_a_resumed_run_replaced_its_log(folder):
    path = folder / 'log.jsonl'
    path.write_text('{"iter": 1, "loss": 3}\n' * 3, encoding='utf-8')
    cursor = curves.appended(path, None)['cursor']
    (folder / 'tmp').write_text('{"iter": 1, "loss": 3}\n' * 4, encoding='utf-8')
    os.replace(folder / 'tmp', path)
    assert curves.appended(path, cursor)['anew'] and len(curves.appended(path, cursor)['records']) == 4


def test_a_long_log_comes_in_parts_of_bounded_size(folder, monkeypatch):
    monkeypatch.setattr(curves, 'MOST', 100)
    path = folder / 'log.jsonl'
    path.write_text(''.join(f'{{"iter": {i}, "loss": 3}}\n' for i in range(20)), encoding='utf-8')
    cursor, records, more = None, [], True
    while more:
        part = curves.appended(path, cursor)
        cursor, more = part['cursor'], part['more']
        records += part['records']
    assert [r['iter'] for r in records] == list(range(20))


def test_the_cursor_of_a_log_survives_javascript(folder, monkeypatch):
    path, real = folder / 'log.jsonl', os.fstat
    path.write_text('{"iter": 1, "loss": 3}\n', encoding='utf-8')
    monkeypatch.setattr(curves.os, 'fstat', lambda fd: SimpleNamespace(  # an inode as Windows and ZFS have them
        st_ino=2**60 + 1, st_size=real(fd).st_size, st_mtime=real(fd).st_mtime))
    cursor = json.loads(json.dumps(curves.appended(path, None)['cursor']), parse_int=lambda text: int(float(text)))
    assert not curves.appended(path, cursor)['anew']


def test_gpt2_weights_in_a_folder_are_a_model_as_well(run, play, folder):
    write_run(folder / 'out', {'kind': 'byte'}, mlp='gelu_tanh')
    done = run('export.py', '--out_dir=out', '--to=weights')
    assert done.status == 0, done.err
    first, second = (models.Models(names, pretrained, CPU).get(name) for names, pretrained, name in (
        (['out'], '', 'out'), ([], 'weights', 'weights')))
    rules = {'temperature': 1.0}
    bars = [[bar['text'] for bar in views.likely(opened, 'abc', [], rules)['bars']] for opened in (first, second)]
    assert bars[0] == bars[1]


# whom it refuses, and what it never reads

@pytest.fixture
def served(play, folder):
    write_run(folder / 'out')
    return play('out')


@pytest.mark.parametrize('host', ['evil.example', 'evil.example:8765', '127.0.0.1.evil.example', '', '192.168.0.7',
                                  'localhost@evil.example', 'a b', '[::1'])
@pytest.mark.parametrize('method, path', [('GET', '/'), ('POST', '/api/models')])
def test_a_foreign_host_is_refused(served, host, method, path):
    assert served.raw(method, path, b'{}', Host=host)[0] == 403


@pytest.mark.parametrize('host', ['localhost', '127.0.0.1:9000', '[::1]:8765', 'LOCALHOST:1'])
def test_this_machines_own_names_are_served(served, host):
    assert served.raw('GET', '/', Host=host)[0] == 200


@pytest.mark.parametrize('origin', ['http://evil.example', 'null', 'http://localhost', 'http://127.0.0.1'])
def test_a_foreign_origin_is_refused(served, origin):
    assert served.raw('POST', '/api/models', b'{}', Host='127.0.0.1:8765', Origin=origin)[0] == 403


def test_the_pages_own_origin_is_served(served):
    assert served.raw('POST', '/api/models', b'{}', Host='localhost:1', Origin='http://localhost:1')[0] == 200


def test_a_form_of_another_page_is_refused_by_its_content_type(served):
    assert served.raw('POST', '/api/models', b'{}', **{'Content-Type': 'text/plain'})[0] == 415


def test_it_listens_on_loopback_alone(served):
    assert served.server.server_address[0] == '127.0.0.1'


def test_with_a_token_nobody_is_served_without_it(play, folder):
    write_run(folder / 'out')
    played = play('out', token='secret')
    assert played.raw('GET', '/')[0] == played.raw('GET', '/?token=Secret')[0] == 401
    assert played.raw('POST', '/api/models', b'{}')[0] == 401
    assert played.raw('GET', '/?token=secret')[0] == 200
    assert played.raw('POST', '/api/models', b'{}', **{'X-Token': 'secret'})[0] == 200


def test_with_a_token_other_machines_may_use_this_ones_address_but_no_strangers_name(play, folder):
    write_run(folder / 'out')
    played = play('out', token='secret')
    assert played.raw('GET', '/?token=secret', Host='192.168.0.7:8765')[0] == 200
    assert played.raw('GET', '/?token=secret', Host='evil.example')[0] == 403


@pytest.mark.parametrize('path', ['/page.html', '/../play.py', '/%2e%2e/play.py', '//etc/passwd', '/out/ckpt.pt',
                                  '/api/models', '/favicon.ico'])
def test_nothing_but_the_page_can_be_fetched(served, path):
    assert served.raw('GET', path)[0] == 404


@pytest.mark.parametrize('name', ['../other', '/etc', 'out/../other', '.', '', None, 7, ['out'], {'a': 1}])
def test_only_the_named_folders_are_models(served, folder, name):
    write_run(folder / 'other')
    with pytest.raises(UserError, match='no model'):
        served.ask('next', model=name, prompt='a')


WRONG = [b'', b'[]', b'{', b'7', b'\xff', b'[' * 100_000, *(b'{"model": "out", %s}' % part for part in (
    b'"temperature": NaN', b'"temperature": 1e999', b'"temperature": -1', b'"top_k": 1.5', b'"top_k": true',
    b'"top_k": 1' + b'0' * 400, b'"top_p": 0', b'"repetition_penalty": 0', b'"prompt": 7', b'"prompt": "\\ud800"',
    b'"prompt": "Z"', b'"after": [99999]', b'"after": [-1]', b'"after": [1.0]', b'"after": "abc"'))]


@pytest.mark.parametrize('kind, body', [*((kind, body) for kind in ('next', 'write') for body in WRONG),
                                        ('write', b'{"model": "out", "max_new_tokens": 1000000}'),
                                        ('write', b'{"model": "out", "seed": -1}')])
def test_what_is_not_understood_is_refused_in_one_line(served, kind, body, capsys):
    status, _, raw = served.raw('POST', f'/api/{kind}', body)
    assert status == 400 and json.loads(raw)['error'].count('\n') == 0
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize('kind, body', [
    ('look', {'text': 'ab', 'layer': 9}), ('look', {'text': 'ab', 'head': -1}), ('look', {'text': ''}),
    ('read', {'text': ''}), ('passage', {'place': 2}), ('passage', {'tokens': 10**6}), ('curves', {'cursors': 7}),
    ('chat', {'turns': []}), ('chat', {'turns': [['assistant', 'a']]}), ('chat', {'turns': [['user']]}),
    ('chat', {'turns': [['user', 'a'], ['assistant', 'b']]}),
    ('chat', {'turns': [['user', 'a' * 60_000]]}), ('read', {'text': 'a' * 50_001}), ('nothing', {})])
def test_values_out_of_range_are_refused(served, kind, body):
    with pytest.raises(UserError):
        served.ask(kind, **body)


def test_a_request_of_over_a_megabyte_is_refused_unread(served):
    status, _, raw = served.raw('POST', '/api/read', b' ' * (server.MOST_BYTES + 1))
    assert status == 413 and '1,048,577' in json.loads(raw)['error']


def test_a_request_without_a_length_is_refused(served):
    with socket.create_connection(('127.0.0.1', served.port)) as reader:
        reader.sendall(b'POST /api/models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n')
        assert b' 411 ' in reader.recv(100)


def test_connections_are_bounded(served):
    idle = [socket.create_connection(('127.0.0.1', served.port)) for _ in range(server.MOST_CONNECTIONS)]
    assert wait_for(lambda: served.server.slots._value == 0)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        served.raw('GET', '/')
    for reader in idle:
        reader.close()
    assert wait_for(lambda: served.server.slots._value > 0) and served.raw('GET', '/')[0] == 200


def test_a_link_to_a_log_elsewhere_is_not_followed(play, folder):
    write_run(folder / 'out')
    (folder / 'secret').mkdir()
    (folder / 'secret' / 'log.jsonl').write_text('{"iter": 1, "loss": 3}\n', encoding='utf-8')
    (folder / 'out' / 'old-1').symlink_to(folder / 'secret')
    (folder / 'out' / 'log.jsonl').symlink_to(folder / 'secret' / 'log.jsonl')
    assert play('out').ask('curves')[0]['runs'] == []


@pytest.mark.parametrize('name', ['../secret', '/secret', '.', 'a/../../secret', '', 7, None])
def test_a_checkpoint_cannot_name_a_dataset_outside_data(play, folder, name):
    write_dataset(folder / 'secret', [2] * 20, chars=CHARS)
    (folder / 'data').mkdir()
    write_run(folder / 'out', config={'dataset': str(folder / 'secret') if name == '/secret' else name})
    played = play('out')
    with pytest.raises(UserError, match='not on this machine'):
        played.ask('passage')
    assert played.models.describe()[0]['passages'] is False


class Code:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_a_checkpoint_cannot_run_code(play, folder):
    (folder / 'out').mkdir()
    torch.save({'model': Code()}, folder / 'out' / 'ckpt.pt')
    with pytest.raises(UserError):
        play('out').ask('next', prompt='a')
    assert not (folder / 'ran').exists()


def test_the_page_may_load_nothing_and_be_shown_in_no_frame(served):
    _, headers, _ = served.raw('GET', '/')
    policy = headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy
    assert "'unsafe-eval'" not in policy and "script-src 'sha256-" in policy


def test_the_page_is_one_file_below_80_kb_without_an_outside_address():
    page = server.PAGE.read_text(encoding='utf-8')
    assert len(page.encode()) < 80_000
    assert set(re.findall(r'https?://[^\s\'"]+', page)) <= {'http://www.w3.org/2000/svg'}
    assert not re.findall(r'<(?:script|img|iframe|link)[^>]+(?:src|href)="(?!data:)', page)


def test_a_bug_is_told_to_the_reader_and_shown_in_the_terminal(served, monkeypatch, capsys):
    monkeypatch.setattr(threading, 'excepthook', lambda args: print(args.exc_type.__name__))
    monkeypatch.setattr(views, 'likely', lambda *args: 1 / 0)
    with pytest.raises(UserError, match='ZeroDivisionError'):
        served.ask('next', prompt='a')
    assert 'ZeroDivisionError' in capsys.readouterr().out


# the command

def test_a_folder_with_nothing_to_show_is_named(run, folder):
    done = run('play.py', '--out_dir=nowhere', '--device=cpu')
    assert done.status == 2 and 'out_dir=nowhere: no ckpt.pt and no log.jsonl' in done.last_error


def test_a_port_in_use_is_told_in_one_line(run, folder):
    write_run(folder / 'out')
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        done = run('play.py', f'--port={port}', '--open=False', '--device=cpu')
    assert done.status == 1 and f'cannot listen on 127.0.0.1:{port}' in done.last_error


@pytest.mark.parametrize('flags, address', [
    ([], r'http://127\.0\.0\.1:\d+/$'), (['--host=0.0.0.0'], r'http://localhost:\d+/\?token=[\w-]{22}$')])
def test_it_prints_an_address_with_a_token_only_where_others_can_reach_it(run, folder, monkeypatch, flags, address):
    write_run(folder / 'out')
    monkeypatch.setattr(server.Server, 'serve_forever', lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    done = run('play.py', '--open=False', '--device=cpu', '--port=0', *flags)
    assert done.status == 0 and re.search(rf'(?m)^open {address}', done.out), done.err


@pytest.mark.parametrize('flag, own', [('--host=0.0.0.0', r'http://192\.168\.7\.8:\d+/'), ('--host=127.0.0.1', None)])
def test_the_address_for_other_computers_is_printed_if_they_can_reach_it(run, folder, monkeypatch, flag, own):
    write_run(folder / 'out')
    monkeypatch.setattr(server.Server, 'serve_forever', lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(socket.socket, 'connect', lambda self, address: None)
    monkeypatch.setattr(socket.socket, 'getsockname', lambda self: ('192.168.7.8', 1234))
    done = run('play.py', '--open=False', '--device=cpu', '--port=0', flag)
    found = re.search(r'(?m)^on another computer: (.*)$', done.out)
    assert bool(found) == bool(own) and (not own or re.fullmatch(own + r'\?token=[\w-]{22}', found[1])), done.out


def test_without_a_network_the_address_for_other_computers_has_this_ones_name(run, folder, monkeypatch):
    def unreachable(self, address):
        raise OSError('Network is unreachable')
    write_run(folder / 'out')
    monkeypatch.setattr(server.Server, 'serve_forever', lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(socket.socket, 'connect', unreachable)
    done = run('play.py', '--open=False', '--device=cpu', '--port=0', '--host=0.0.0.0')
    assert f'on another computer: http://{socket.gethostname()}:' in done.out


def test_in_a_notebook_the_page_is_shown_below_the_cell(folder):
    pytest.importorskip('nbclient')
    import nbformat
    from nbclient import NotebookClient
    write_run(folder / 'out')
    cell = nbformat.v4.new_code_cell(f'%run {REPO}/play.py --out_dir=out --device=cpu --port=0')
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=120, kernel_name='python3').execute()
    shown = ''.join(o.get('data', {}).get('text/html', '') for o in cell.outputs)
    assert re.search(r'<iframe[^>]*\ssrc="http://127\.0\.0\.1:\d+/"', re.sub(r'\s+', ' ', shown))



def test_in_colab_the_page_goes_through_its_proxy_with_a_token(run, folder, monkeypatch):
    write_run(folder / 'out')
    shown = {}
    output = SimpleNamespace(serve_kernel_port_as_iframe=lambda port, path, height: shown.update(port=port, path=path))
    monkeypatch.setitem(sys.modules, 'google', SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'google.colab', SimpleNamespace(output=output))
    monkeypatch.setattr('lib.training.log.in_notebook', lambda: True)
    done = run('play.py', '--device=cpu', '--port=0')
    assert done.status == 0, done.err

    def status(path):
        connection = http.client.HTTPConnection('127.0.0.1', shown['port'], timeout=20)
        with contextlib.closing(connection):
            connection.request('GET', path, headers={'Host': 'abc-colab.googleusercontent.com'})
            return connection.getresponse().status
    assert status(shown['path']) == 200 and status('/') == 401


@pytest.mark.parametrize('flags, opened', [([], 1), (['--open=False'], 0)])
def test_the_browser_is_opened_unless_told_otherwise(run, folder, monkeypatch, flags, opened):
    write_run(folder / 'out')
    addresses = []

    def serve_forever(self):
        wait_for(lambda: addresses, seconds=1)
        raise KeyboardInterrupt
    monkeypatch.setattr(server.Server, 'serve_forever', serve_forever)
    monkeypatch.setattr('webbrowser.open', addresses.append)
    monkeypatch.setenv('DISPLAY', ':0')
    done = run('play.py', '--device=cpu', '--port=0', *flags)
    assert len(addresses) == opened and all(f'open {address}\n' in done.out for address in addresses)


def test_a_panic_in_a_library_does_not_end_the_worker(monkeypatch):
    class PanicException(BaseException):
        pass

    def panics():
        raise PanicException('in Rust')
        yield
    monkeypatch.setattr(threading, 'excepthook', lambda args: None)
    found = worker.Worker()
    assert found.submit(panics).results.get(timeout=20) == ('error', 'PanicException: in Rust')
    assert found.submit(lambda: [1]).results.get(timeout=20) == ('item', 1)
