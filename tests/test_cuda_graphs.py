"""What torch.compile makes of the model for an H100, planned on the CPU with tensors that have no memory.

tests/fake_cuda.py says how. Nothing here ran on a GPU: it counts kernels and the bytes that they read and write.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import REPO

SKIP = [reason for holds, reason in (
    (sys.platform != 'linux', 'loads shared libraries as Linux does'),
    (not shutil.which('g++'), 'no C++ compiler (g++)'),
    (torch.version.cuda or torch.version.hip, 'needs a torch that was built for the CPU'),
    (not torch.__version__.startswith('2.13'), "reads Inductor's plans as torch 2.13 makes them")) if holds]
# per layer: (model, direction, kernels that are no matrix products, the GB that they read and write)
BOUNDS = [('classic', 'forward', 7, 0.66), ('classic', 'backward', 12, 1.01),
          ('modern', 'forward', 8, 0.68), ('modern', 'backward', 10, 0.96),
          ('classic, bf16_residual', 'forward', 7, 0.45), ('classic, bf16_residual', 'backward', 10, 0.70),
          ('modern, bf16_residual', 'forward', 8, 0.58), ('modern, bf16_residual', 'backward', 10, 0.75)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(SKIP), reason='; '.join(SKIP))]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What fake_cuda.py prints."""
    library, here = tmp_path_factory.mktemp('fake') / 'fake_cuda.so', Path(torch.__file__).parent
    include = [f'-I{here}/include', f'-I{here}/include/torch/csrc/api/include']
    subprocess.run(['g++', '-O0', '-std=c++20', '-shared', '-fPIC', *include, REPO / 'tests' / 'fake_cuda.cpp',
                    '-o', library, f'-L{here}/lib', '-lc10', '-ltorch_cpu'], check=True)
    done = subprocess.run([sys.executable, REPO / 'tests' / 'fake_cuda.py', library], capture_output=True, text=True,
                          env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': str(library.parent)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('model', ['modern', 'dropout'])
def test_three_contexts_and_the_evaluation_compile_once_each_without_a_break(found, model):
    assert found[f'shapes of {model}'] == [2, 2, 2, 1, 0, 0]  # training: the forward and the backward pass


def test_attention_gets_bfloat16_from_a_model_with_float32_weights(found):
    assert found['attention'] == ['torch.bfloat16']


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_an_update_reads_no_tensor_of_the_device(found, kind):
    assert found[f'update by {kind}']


@pytest.mark.parametrize('model, direction, kernels, gigabytes', BOUNDS)
def test_a_layer_costs_at_most_these_kernels_and_bytes(found, model, direction, kernels, gigabytes):
    """Of 16 x 1024 tokens and 768 channels; matrix products and attention are not among them."""
    (_, few, small), (_, many, large) = (layers[direction == 'backward'] for layers in found[model])
    assert many - few <= kernels and (large - small) / 1e9 <= gigabytes


def test_a_recorded_token_of_gpt2_takes_at_most_160_operations(found):
    assert found['decoding'] <= 160
