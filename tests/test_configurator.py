"""configurator.py: values, their origins, and error messages."""
import os
import signal
import subprocess
import sys

import pytest

from configurator import (
    REPO,
    Origin,
    Settings,
    UserError,
    configure,
    describe,
    find_path,
    literals,
    resolve,
)
from lib.machine import console

DEFAULTS = {'batch_size': 12, 'learning_rate': 6e-4, 'bias': False, 'sure': True, 'dataset': 'owt', 'device': 'auto',
            'start': ''}


@pytest.mark.parametrize('words, name, value', [
    (['--batch_size=3'], 'batch_size', 3), (['--batch_size', '3'], 'batch_size', 3),
    (['--batch-size=3'], 'batch_size', 3), (['--batch_size=1_000'], 'batch_size', 1000),
    (['--learning_rate=1'], 'learning_rate', 1.0), (['--learning_rate=1e-3'], 'learning_rate', 1e-3),
    (['--bias'], 'bias', True), (['--bias=true'], 'bias', True), (['--bias=1'], 'bias', True),
    (['--bias=YES'], 'bias', True), (['--sure', 'no'], 'sure', False), (['--sure=False'], 'sure', False),
    (['--sure=0'], 'sure', False), (['--sure'], 'sure', True), (['--bias', '--batch_size=5'], 'bias', True),
    (['--start=a=b=c'], 'start', 'a=b=c'), (['--start=42'], 'start', '42'), (['--start='], 'start', ''),
    (['--start=--x'], 'start', '--x'), (['--start', ' two words '], 'start', ' two words '),
    (['--batch_size=1', '--batch_size=2'], 'batch_size', 2),
])
def test_a_flag_is_read_as_the_type_of_the_default(words, name, value):
    settings = resolve(DEFAULTS, words)
    assert not settings.errors and settings[name] == value and type(settings[name]) is type(DEFAULTS[name])


@pytest.mark.parametrize('words, message', [
    (['--batch_size=1.5'], '--batch_size=1.5: expected a whole number'),
    (['--learning_rate=fast'], '--learning_rate=fast: expected a number'),
    (['--bias=2'], '--bias=2: expected True or False'), (['--batch_size'], '--batch_size needs a value'),
    (['--start', '--bias'], '--start needs a value'), (['--datset=x'], 'did you mean dataset?'),
    (['--zzz=1'], '--help lists them all'), (['nope.py'], 'config file nope.py not found'),
    (['batch_size=3'], 'two hyphens: --batch_size=3'), (['-batch-size=3'], 'two hyphens: --batch-size=3')])
def test_a_mistake_on_the_command_line_is_reported(words, message):
    assert message in '\n'.join(resolve(DEFAULTS, words).errors)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def config(name, text):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return name
    return config


@pytest.mark.parametrize('order', [['--batch_size=5', 'a.py', 'b.py'], ['a.py', 'b.py', '--batch_size=5']])
def test_flags_override_configs_in_any_order_and_a_later_config_an_earlier_one(config, order):
    config('a.py', 'batch_size = 1\ndataset = "a"\nlearning_rate = 1\n')
    config('b.py', 'batch_size = 2\ndataset = "b"\n')
    s = resolve(DEFAULTS, order)
    assert (s['batch_size'], s['dataset'], s['learning_rate']) == (5, 'b', 1.0)
    assert [s.origins[n] for n in ('batch_size', 'dataset', 'learning_rate', 'bias')] == [
        Origin('flag', '--batch_size'), Origin('config', 'b.py:2'), Origin('config', 'a.py:3'), Origin('default', '')]


def test_a_config_file_sees_the_values_so_far(config):
    config('a.py', 'if device == "cpu":\n    batch_size = batch_size // 4\n')
    assert resolve(DEFAULTS, ['a.py', '--device=cpu'])['batch_size'] == 3
    assert resolve(DEFAULTS, ['a.py'], early={'device': lambda: 'cpu'})['batch_size'] == 3
    assert resolve(DEFAULTS, ['a.py', '--device=mps'], early={'device': lambda: 'cpu'})['batch_size'] == 12


@pytest.mark.parametrize('text, message', [
    ('batch_sise = 3\n', 'a.py:1: unknown setting batch_sise; did you mean batch_size?'),
    ('\nbatch_size = "3"\n', "a.py:2: batch_size = '3': expected int"),
    ('bias = 1\n', 'a.py:1: bias = 1: expected bool'), ('batch_size = None\n', 'expected int'),
    ('x = \n', 'a.py:1: SyntaxError'), ('\nbatch_size = 1 / 0\n', 'a.py:2: ZeroDivisionError'),
    ('dataset = nowhere\n', 'a.py:1: NameError')])
def test_a_mistake_in_a_config_file_names_the_line(config, text, message):
    found = resolve(DEFAULTS, [config('a.py', text)])
    assert message in found.errors[0] and found == DEFAULTS


def test_all_mistakes_are_reported_and_the_status_is_2(capsys):
    namespace = dict(DEFAULTS)
    with pytest.raises(SystemExit) as end:
        configure(namespace, ['--bias=2', '--typo=1'], check=lambda s: ['a third'])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 3 and all(line.startswith('error: ') for line in lines)
    assert namespace == DEFAULTS


def test_settings_are_the_plain_values_whose_names_begin_with_a_letter(monkeypatch):
    namespace = {'n': 1, '_n': 2, 'f': print, 'm': os}
    monkeypatch.setattr(sys, 'argv', ['train.py', '--n=5'])
    assert configure(namespace) == {'n': 5} and namespace['n'] == 5


def test_a_user_error_is_one_line_and_status_1():
    with pytest.raises(SystemExit) as end:
        raise UserError('out of luck')
    assert end.value.code == 'error: out of luck'  # Python prints it and exits with status 1


def test_help_lists_every_setting_with_its_comment(capsys):
    with pytest.raises(SystemExit) as end:
        configure({**DEFAULTS, '__file__': str(REPO / 'train.py')}, ['--help'])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert any('--batch_size' in line and 'int' in line and '12' in line and 'micro-batch' in line for line in lines)


def test_help_shows_only_the_block_of_defaults():
    script = '"""What it does."""\n\n# a group\nx = 3  # how many\n\ndef f():\n    y = 4  # no setting\n'
    text = describe(script, {'x': 3})
    assert 'What it does.' in text and 'how many' in text and 'a group' in text and 'no setting' not in text


def test_help_ends_its_settings_at_the_first_function():
    assert describe('"""Doc."""\nx = 3  # how many\ndef f():\n    pass\nx = 5  # later\n', {'x': 3}).count('--x') == 1


def test_the_columns_of_help_line_up():
    script = '"""What it does."""\nx = 3  # how many\n# --- a rule\nname: str = "a"\n'
    doc, empty, title, *lines = describe(script, {'x': 3, 'name': 'a'}).splitlines()
    assert (doc, empty, title) == ('What it does.', '', 'Settings (--name=value):')
    assert [line.split() for line in lines] == [['--x', 'int', '3', 'how', 'many'], ['--name', 'str', "'a'"]]
    assert [lines[0].index(word) for word in ('--x', 'int', '3', 'how')] == [2, 33, 39, 62]
    assert describe('# at the top\nx = 3\n', {'x': 3}).split() == ['--x', 'int', '3']  # a script without a docstring
    assert describe(script, {'x': 3}, 'Another text.').startswith('Another text.\n\nSettings')


def test_a_comment_on_a_line_by_itself_is_a_heading_in_help_only_between_settings():
    script = ("import os\n# about the import\n\nx = 3  # how many\n# right after a setting\ny = 4\n\n# after a gap\n"
              "z = 5\n")
    headings = [line.strip() for line in describe(script, {'x': 3, 'y': 4, 'z': 5}).splitlines() if '--' not in line]
    assert [line for line in headings if line] == ['right after a setting', 'after a gap']


def test_a_path_is_looked_up_in_the_working_directory_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_path('train.py') == REPO / 'train.py'
    (tmp_path / 'train.py').touch()
    assert find_path('train.py').resolve() == tmp_path / 'train.py'


@pytest.mark.parametrize('kind, place, was_set, set_by_flag, on_command_line', [
    ('default', '', False, False, False), ('config', 'x.py:3', True, False, False),
    ('flag', '--a', True, True, True), ('flag', 'out/last.pt', True, True, False),  # typed in the run that is resumed
    ('checkpoint', 'out/last.pt', True, False, False)])
def test_the_origin_of_a_value_answers_who_set_it(kind, place, was_set, set_by_flag, on_command_line):
    s = Settings({'a': 1, 'b': 2})
    s.put('a', 3, kind, place)
    assert s['a'] == 3
    assert (s.was_set('a'), s.set_by_flag('a'), s.on_command_line('a')) == (was_set, set_by_flag, on_command_line)
    assert s.kinds() == {'a': kind, 'b': 'default'}


def test_constants_and_names_with_an_underscore_are_no_settings():
    assert literals({'size': 1, 'BARS': 'x', 'Name': 'x', '_private': 2, 'path': REPO}) == {'size': 1}


def test_an_automatic_value_is_not_one_that_was_given():
    s = resolve(DEFAULTS, [], early={'device': lambda: 'cpu'})
    assert s['device'] == 'cpu' and not s.was_set('device')


@pytest.mark.parametrize('typo, suggestion', [('batch', 'batch_size'), ('learning', 'learning_rate'),
                                              ('data', 'dataset'), ('baitch_size', 'batch_size')])
def test_a_name_with_the_typed_prefix_is_suggested_before_a_similar_one(typo, suggestion):
    known = {**DEFAULTS, 'date': 1}  # `date` is more similar to `data`
    assert resolve(known, [f'--{typo}=1']).errors == [f'unknown setting --{typo}; did you mean {suggestion}?']


def test_a_folder_given_as_a_config_file_is_reported_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out-x').mkdir()
    assert resolve({'out_dir': 'out'}, ['out-x']).errors == [
        'out-x is a folder, not a config file; to name a run, use --out_dir=out-x']


@pytest.mark.parametrize('words, others', [(['--zzz', '5'], []), (['--zzz', '--bias'], []), (['--zzz'], []),
                                          (['--zzz=1', '5'], ['config file 5 not found']),
                                          (['--zzz', 'no.py'], ['config file no.py not found'])])
def test_the_value_of_an_unknown_setting_is_not_taken_for_a_config_file(words, others):
    settings = resolve(DEFAULTS, words)
    assert settings.errors == ['unknown setting --zzz; --help lists them all', *others]
    assert settings['bias'] == ('--bias' in words)


def test_a_config_file_may_have_imports_functions_and_private_names(config):
    config('a.py', 'import math\ndef double(x):\n    return 2 * x\n_four = double(2)\nbatch_size = _four\n'
                   'learning_rate = max(x / 8 for x in (_four, 1))\n')
    settings = resolve(DEFAULTS, ['a.py'])
    assert not settings.errors and (settings['batch_size'], settings['learning_rate']) == (4, 0.5)


def test_a_similar_config_file_is_suggested(config):
    assert resolve(DEFAULTS, ['train_shakespear_char.py']).errors == [
        'config file train_shakespear_char.py not found; did you mean config/train_shakespeare_char.py?']


def test_one_config_file_is_suggested_not_several():
    error, = resolve(DEFAULTS, ['config/train_shakespear_char.py', '--bias']).errors
    assert error.count('did you mean') == 1
    error, = resolve(DEFAULTS, ['eval_gpt2_larg.py']).errors  # there are eval_gpt2_medium.py and eval_gpt2_xl.py, too
    assert error.count('did you mean') == 1


@pytest.mark.parametrize('argv, files', [([], 'a'), (['x', 'y'], 'x\ny'),
                                         (['--files=x', 'y', '--files', 'z'], 'x\nz\ny')])
def test_words_that_are_not_flags_are_the_values_of_one_setting(argv, files):
    settings = resolve({'files': 'a', 'n': 1}, argv, words='files')
    assert not settings.errors and settings['files'] == files


def test_a_setting_given_twice_has_its_last_value_only():
    assert resolve({'files': 'a', 'n': 1}, ['--n=2', '--n=3', '--files=b', '--files=c'])['files'] == 'c'


@pytest.mark.parametrize('n, shown', [(200, 'ValueError: ' + 'a ' * 99 + 'aa'),
                                      (201, 'ValueError: ' + 'a ' * 98 + 'a ...')])
def test_the_reason_of_an_error_has_at_most_200_characters(n, shown):
    assert console.reason(ValueError('a ' * 99 + 'a' * (n - 198))) == shown
    assert console.reason(UserError('two\nlines')) == 'two lines'


def test_too_little_memory_is_reported_in_one_line(capsys):
    class ArrayMemoryError(MemoryError):  # numpy has such a class
        pass
    for error in (ArrayMemoryError('x'), RuntimeError("can't allocate memory: 5 GB")):
        console.print_exception(type(error), error, None)
    assert capsys.readouterr().err == ("error: out of memory (ArrayMemoryError: x)\n"
                                       "error: out of memory (RuntimeError: can't allocate memory: 5 GB)\n")
    console.print_exception(Exception, Exception('something else'), None)
    assert capsys.readouterr().err == 'Exception: something else\n'


def test_values_are_not_checked_if_a_config_file_cannot_be_read(config, capsys):
    config('a.py', 'batch_size = 1 +\n')
    for words in (['a.py'], ['nope.py'], ['dataset=x']):
        with pytest.raises(SystemExit):
            configure(dict(DEFAULTS), words, check=lambda s: ['the dataset is not prepared'])
        assert 'not prepared' not in capsys.readouterr().err


SCRIPT = "from configurator import configure; configure({}, [])\n"


def test_ctrl_c_prints_one_word_instead_of_a_traceback():
    done = subprocess.run([sys.executable, '-c', SCRIPT + 'raise KeyboardInterrupt'], cwd=REPO, capture_output=True)
    assert done.stderr == b'interrupted\n' and done.returncode in (-signal.SIGINT, 130)
    done = subprocess.run([sys.executable, '-c', SCRIPT + '1 / 0'], cwd=REPO, capture_output=True)
    assert b'Traceback' in done.stderr and done.returncode == 1


@pytest.mark.parametrize('name, expected', [('ascii', b'??\n'), ('ascii:backslashreplace', b'\\u4eba\\u4e4b\n'),
                                          ('gb18030', '人之\n'.encode('gb18030'))])
def test_a_requested_encoding_is_used_and_what_it_lacks_becomes_a_question_mark(name, expected):
    done = subprocess.run([sys.executable, '-c', SCRIPT + "print('\\u4eba\\u4e4b')"], cwd=REPO, capture_output=True,
                          env={**os.environ, 'PYTHONIOENCODING': name})
    assert done.stdout == expected, done.stderr


@pytest.mark.parametrize('path, why', [('~no-such-user/x', 'home'), ('x' * 5000, 'too long')])
def test_a_path_that_no_file_can_have_is_one_line(path, why):
    with pytest.raises(UserError, match=why):
        find_path(path)


def test_a_config_file_with_a_byte_order_mark_or_from_a_pipe_is_read(tmp_path):
    (tmp_path / 'a.py').write_text('size = 7\n', encoding='utf-8-sig')
    assert resolve({'size': 1}, [str(tmp_path / 'a.py')])['size'] == 7
    reader, writer = os.pipe()
    os.write(writer, b'size = 8\n')
    os.close(writer)
    assert resolve({'size': 1}, [f'/dev/fd/{reader}'])['size'] == 8
    os.close(reader)


def test_a_whole_number_of_more_than_64_bits_is_refused():
    found = resolve({'size': 1}, ['--size=1' + '0' * 400])
    assert found.errors == ['size is a number of more than 64 bits'] and not found.understood
    assert not resolve({'size': 1}, [f'--size={2**64 - 1}']).errors and resolve({'size': 1}, [f'--size={2**64}']).errors


@pytest.mark.parametrize('length, shown', [(2000, 2000), (2001, 1505), (10**6, 1505)])
def test_a_message_of_more_than_2000_characters_is_shortened(length, shown):
    assert len(UserError('x' * length).message) == shown


@pytest.mark.parametrize('word', ['out/lr=0.1/a.py', 'bias'])
def test_a_word_is_a_forgotten_hyphen_only_if_it_sets_a_setting(word):
    assert resolve(DEFAULTS, [word]).errors == [f'config file {word} not found']


def test_an_error_in_a_library_is_reported_with_the_line_of_the_config_file(config):
    for n, line in enumerate(('import string\nstring.capwords(None)', 'import json\njson.loads("{\\n\\n\\n")')):
        config(f'{n}.py', f'{line}\n')
        assert resolve(DEFAULTS, [f'{n}.py']).errors[0].startswith(f'{n}.py:2: ')
