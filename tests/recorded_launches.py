# SPDX-License-Identifier: Apache-2.0
"""What the launchers would launch on a GPU, asked of a process of its own: this one's kernels are interpreted."""

import json
import os
import subprocess
import sys

TARGET = "sm_90"


def recorded(*requests: tuple[str, str, dict]) -> list[dict[str, list[dict]]]:
    """For each (op, dtype, options), as in the cases of `fla_ops.kernels.report`: the launches of each pass, with
    the name of the kernel, the grid, and a key that two launches share if and only if they share their machine code."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__] if sys.version_info >= (3, 11) else [sys.executable, __file__]
    run = subprocess.run(command, input=json.dumps(requests), env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _answer(requests):
    from fla_ops.kernels.report import Case, recorded

    for op, dtype, options in requests:
        passes = recorded(Case(op, dtype, options), TARGET)
        yield {
            name: [{"kernel": x.name, "grid": x.grid, "key": x.key} for x in launches]
            for name, launches in passes.items()
        }


if __name__ == "__main__":
    print(json.dumps(list(_answer(json.load(sys.stdin)))))
