"""config/: one assignment per line, no surprises, and one recipe for everything that is not an NVIDIA GPU."""
import ast
import re

import pytest
from conftest import REPO, TINY

from configurator import resolve

CONFIGS = sorted(p.name for p in (REPO / 'config').glob('*.py'))
# what a config may ask: is there an NVIDIA GPU, how much time is there, and what the config before it has set
CONDITIONS = {"not device.startswith('cuda')", "not device.startswith('cuda') and max_minutes <= 1",
              "not device.startswith('cuda') and max_minutes >= 10",
              "not device.startswith('cuda') and max_minutes >= 30",
              'n_embd < 768', 'window'}
RECIPE_START, RECIPE_END = '# The recipe for small models without a GPU', 'context_warmup = 0.6'


def settings_of(*configs, device, flags=()):
    """Return the Settings that train.py would have for these configs and flags on a device."""
    defaults = {}
    for node in ast.parse((REPO / 'train.py').read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign):
            value = eval(compile(ast.Expression(node.value), 'train.py', 'eval'), {})
            if type(value) in (int, float, bool, str):
                defaults[node.targets[0].id] = value
    settings = resolve(defaults, [*(str(REPO / 'config' / name) for name in configs), *flags],
                       {'device': lambda: device})
    assert settings.errors == []
    return settings


def recipe(name):
    """Return the text of the CPU recipe in a config, without its indentation; '' if the config does not have it."""
    text = (REPO / 'config' / name).read_text(encoding='utf-8')
    found = re.search(rf'^ *{RECIPE_START}.*?^ *{RECIPE_END}.*?$', text, re.S | re.M)
    return re.sub('^ +', '', found.group(), flags=re.M) if found else ''


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_is_a_docstring_and_one_assignment_per_line(name):
    tree = ast.parse((REPO / 'config' / name).read_text(encoding='utf-8'))
    assert ast.get_docstring(tree)
    lines = []
    for node in tree.body[1:]:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in CONDITIONS and not node.orelse
        lines += node.body if isinstance(node, ast.If) else [node]
    for node in lines:
        assert isinstance(node, ast.Assign) and [type(t) for t in node.targets] == [ast.Name], ast.unparse(node)
        assert not any(isinstance(n, (ast.Call, ast.IfExp)) for n in ast.walk(node.value)), ast.unparse(node)
    assert len({node.lineno for node in lines}) == len(lines)


def test_the_recipe_without_a_gpu_is_the_same_text_wherever_it_is_used():
    with_muon = [name for name in CONFIGS if settings_of(name, device='cpu')['optimizer'] == 'muon'
                 and settings_of(name, device='cpu')['max_minutes']]
    assert len(with_muon) >= 8
    texts = {name: recipe(name) for name in with_muon}
    assert set(texts.values()) == {recipe('train_shakespeare_char.py')} != {''}


@pytest.mark.parametrize('flags, width', [
    (['--max_minutes=0.75'], 96), (['--max_minutes=1'], 96), ([], 128), (['--max_minutes=20'], 192),
    (['--max_minutes=30'], 256), (['--max_minutes=20', '--n_embd=64'], 64)])
def test_shakespeares_model_grows_with_the_minutes(flags, width):
    settings = settings_of('train_shakespeare_char.py', device='cpu', flags=flags)
    assert settings['n_embd'] == width and width % settings['n_head'] == 0
    assert settings_of('train_shakespeare_char.py', device='cuda', flags=flags[:1])['n_embd'] == 384


@pytest.mark.parametrize('name', CONFIGS)
def test_every_device_but_cuda_gets_the_same_settings(name):
    on_cpu, on_mps, on_cuda, on_second = (settings_of(name, device=d) for d in ('cpu', 'mps', 'cuda', 'cuda:1'))
    assert on_cpu == {**on_mps, 'device': 'cpu'}
    assert on_cuda == {**on_second, 'device': 'cuda'}


@pytest.mark.parametrize('name', [n for n in CONFIGS if re.match('train_(?!gpt2)|finetune|continue', n)])
def test_a_tutorial_recipe_ends_within_minutes_without_an_nvidia_gpu(name):
    settings = settings_of(name, device='mps')
    tokens = settings['max_iters'] * settings['batch_size'] * settings['block_size'] * \
        settings['gradient_accumulation_steps']
    assert settings['max_minutes'] or tokens < 2e6 and (settings['init_from'] == 'scratch' or tokens < 1e6)


def test_gpt2_classic_undoes_every_choice_of_the_recipe():
    classic, plain = (settings_of(*names, device='cpu') for names in (
        ('train_shakespeare_char.py', 'gpt2_classic.py'), ('train_sanzijing_char.py',)))
    recipe_settings = re.findall(r'^(\w+) =', recipe('train_shakespeare_char.py'), re.M)
    unlike = [name for name in recipe_settings if name not in ('muon_lr', 'muon_momentum', 'cooldown_frac')
              and classic[name] != plain[name]]
    assert unlike == [] and classic['optimizer'] == 'adamw'


@pytest.mark.parametrize('name', [n for n in CONFIGS if n.startswith('train_')])
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_every_training_config_trains(run, workdir, name, device):
    """The config's own values for a device, at an eighth of its width, on the CPU."""
    chosen = settings_of(name, device=device)
    small = [f'--{key}={chosen[key]}' for key in ('pos', 'norm', 'mlp', 'qk_norm', 'tie_weights', 'softcap', 'smear',
                                                  'optimizer', 'lr_schedule', 'dropout', 'weight_decay', 'beta2')]
    heads, width = chosen['n_head'], chosen['n_embd'] // 8
    done = run('train.py', REPO / 'config' / name, *TINY, *small, f'--n_head={heads}', f'--n_embd={width}',
               '--max_iters=2', '--out_dir=out', '--compile=False')
    assert done.status == 0, done.err
    assert 'step 2: train loss' in done.out


def test_the_modern_gpt2_has_heads_of_128_and_the_classic_one_its_64():
    sizes = {name: settings_of(name, device='cuda') for name in ('train_gpt2_modern.py', 'train_gpt2.py')}
    assert [s['n_embd'] // s['n_head'] for s in sizes.values()] == [128, 64]
