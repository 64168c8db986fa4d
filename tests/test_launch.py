# SPDX-License-Identifier: Apache-2.0
"""`kernels/_launch.launch` beside Triton's own launch: the same code, found again, gets the same arguments."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402 - needs triton


def test_triton_finds_the_same_code_again():
    """Every combination that Triton compiles for: addresses, None, dtypes, numbers of 1, 16 and beyond 32 bits."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # kernels of this process are interpreted
    command = [sys.executable, "-P", __file__] if sys.version_info >= (3, 11) else [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)


@triton.jit(do_not_specialize=["T", "scale"])
def kernel(x, y, scale, T, stride, C: tl.constexpr, D: tl.constexpr):
    tl.store(x, C)


class OnGpu(torch.Tensor):
    is_cuda = True


class Code:
    """Compiled code that does nothing but remember how it was run."""

    function, packed_metadata = 7, "packed"

    def run(self, *args):
        self.ran = args

    def launch_metadata(self, *args):
        return None


def compile(kernel, key, signature, device, *_, **__):
    code = Code()
    kernel.device_caches[device][0][key] = code
    return code


def addresses(args):
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]


def compare():
    from fla_ops.kernels import _launch
    from triton.runtime.jit import JITFunction

    JITFunction._do_compile = compile
    memory = torch.zeros(64).as_subclass(OnGpu)
    tensors = (memory, memory[1:], memory.to(torch.bfloat16))
    numbers = (1, 2, 16, 17, 2**31 + 16)
    launches = 0
    found = set()
    for x, y, scale, T, stride, C in itertools.product(
        tensors, (None, *tensors), (0.5, 1.0), (1, 48, 2**40), numbers, (3, 4)
    ):
        args, constants = (x, y, scale, T, stride), _launch.constexprs(C=C, D=False, num_warps=2)
        code = kernel[(5, 6)](*args, **constants)
        expected = code.ran
        for _ in range(2):  # looked up the second time at the latest
            code.ran = ()
            _launch.launch(kernel, (5, 6), args, constants)
            assert code.ran, "other code ran"
            assert code.ran[:6] == expected[:6] == (5, 6, 1, 0, 7, "packed")
            assert addresses(code.ran[9:]) == addresses(expected[9:])
        assert not any(isinstance(a, torch.Tensor) for a in code.ran), "this was Triton's own launch"
        found.add(code)
        launches += 1
    lookups = len(_launch._compiled)
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: None)
    _launch.launch(kernel, (5, 6), args, constants)
    assert any(isinstance(a, torch.Tensor) for a in code.ran), "a profiler's hooks belong to Triton's own launch"
    print(len(found), "variants,", launches, "launches,", lookups, "lookups")


if __name__ == "__main__":
    from fla_ops.kernels import _ahead_of_time

    with _ahead_of_time._active("sm_90"):
        compare()
