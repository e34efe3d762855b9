"""lib/machine/compiler.py: compile only where it works, computes the same, and pays."""
import types

import pytest
import torch

from configurator import UserError
from lib.machine import compiler
from lib.machine.runtime import Runtime


def cpu(**more):
    return Runtime(torch.device('cpu'), torch.float32, **{'compile': True, 'description': '', **more})


@pytest.fixture
def model(monkeypatch):
    """A model, whose compiled form is itself with `wrong` set to whatever a test wants to go wrong."""
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, 'compile', lambda model, dynamic: types.SimpleNamespace(model=model, compiled=True))
    return model


def step(compiled=lambda: 1.0, eager=lambda: 1.0):
    """Return a try_step; compiled and eager give the factor of the loss, or raise."""
    def try_step(network):
        is_compiled = hasattr(network, 'compiled')
        loss = (network.model if is_compiled else network)(torch.ones(1, 2)).square().sum()
        loss = loss * (compiled if is_compiled else eager)()
        loss.backward()
        return loss.detach()
    return try_step


def fail(error):
    raise error


def test_a_compiled_step_that_equals_eager_mode_is_used(model, capsys):
    assert compiler.compile_or_fall_back(model, cpu(), False, step()).compiled
    assert capsys.readouterr().err == 'compiling, one to two minutes\n'
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('factor, differs', [(1.01, False), (1.1, True), (0.9, True), (float('nan'), True)])
def test_a_compiled_step_that_computes_another_result_is_not_used(model, capsys, factor, differs):
    used = compiler.compile_or_fall_back(model, cpu(), False, step(lambda: factor))
    assert (used is model) == differs and ('computes another loss' in capsys.readouterr().err) == differs


def test_another_result_is_an_error_if_compile_was_asked_for(model):
    with pytest.raises(UserError, match='compile=True: the compiled model computes another loss .* leave it out'):
        compiler.compile_or_fall_back(model, cpu(), True, step(lambda: 2.0))


def test_dropout_which_makes_two_steps_differ_does_not_turn_compile_off(model):
    factors = iter([1.0, 1.0, 0.9])  # warm-up and two steps in eager mode
    assert compiler.compile_or_fall_back(model, cpu(), False, step(lambda: 1.1, lambda: next(factors))).compiled


def test_a_compile_that_fails_falls_back_with_one_line(model, capsys):
    state = torch.get_rng_state()
    error = RuntimeError('no C++ compiler\nand forty more lines')
    broken = step(lambda: fail(error), lambda: 1 + 0 * float(torch.rand(1)))
    assert compiler.compile_or_fall_back(model, cpu(), False, broken) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().err.splitlines()[1:] == [
        'compile failed (RuntimeError: no C++ compiler); continuing without it']


def test_a_compile_that_was_asked_for_and_fails_is_an_error(model):
    with pytest.raises(UserError, match=r'compile=True: .*ZeroDivisionError: division by zero\); leave it out'):
        compiler.compile_or_fall_back(model, cpu(), True, step(lambda: 1 / 0))


@pytest.mark.parametrize('explicit', [True, False])
def test_out_of_memory_is_no_compile_failure(model, explicit):
    with pytest.raises(torch.OutOfMemoryError):
        compiler.compile_or_fall_back(model, cpu(), explicit, step(lambda: fail(torch.OutOfMemoryError('20 GiB'))))


@pytest.mark.parametrize('seconds, explicit, compiled', [(100, False, False), (100, True, True), (1000, False, True)])
def test_a_short_run_is_not_compiled_unless_asked_for(model, capsys, seconds, explicit, compiled):
    used = compiler.compile_or_fall_back(model, cpu(), explicit, step(), lambda step_seconds: seconds)
    assert hasattr(used, 'compiled') == compiled
    assert ('the run takes about 100 s without' in capsys.readouterr().err) == (not compiled)


def test_without_compile_the_model_is_returned_at_once(model):
    assert compiler.compile_or_fall_back(model, cpu(compile=False), False, None) is model


@pytest.mark.parametrize('version, value', [('2.10.1', False), ('2.11.0', True), ('2.13.0+cpu', True)])
def test_mix_order_reductions_are_off_in_the_version_that_gets_them_wrong(model, monkeypatch, version, value):
    monkeypatch.setattr(torch, '__version__', version)
    import torch._inductor.config as config
    monkeypatch.setattr(config.triton, 'mix_order_reduction', True, raising=False)
    compiler.compile_or_fall_back(model, cpu(), False, step())
    assert config.triton.mix_order_reduction is value


def test_what_compiles_later_fails_at_the_start(run, workdir, monkeypatch):
    """The graph of the evaluation and the shapes of context_warmup are compiled with the first one."""
    from conftest import TINY
    seen = []

    def backend(graph, inputs):
        seen.append(1)
        return graph.forward
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, dynamic: real(model, dynamic=dynamic, backend=backend))
    done = run('train.py', *TINY, '--compile=True', '--max_iters=2', '--context_warmup=0.6')
    assert done.status == 0 and len(seen) >= 4, done.err
