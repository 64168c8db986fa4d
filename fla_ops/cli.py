# SPDX-License-Identifier: Apache-2.0
"""The `fla-ops` console script: arguments here, each command in a file of `commands/`, imported when it runs."""

import argparse
import sys

from . import __version__
from ._backend import OPS
from .commands import CommandError
from .commands.demo_model import MIXERS


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fla-ops", description="What runs here, is it right, how fast is it.")
    top.add_argument("--version", action="version", version=f"fla_ops {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, devices, and which backend runs each op, or why it cannot")
    info.add_argument("--json", action="store_true", help="the same as one JSON object")

    commands.add_parser("selftest", help="every op, backend and dtype against the float64 reference, in under a minute")

    demo = commands.add_parser("demo", help="train a small language model on the kernels, then time and draw it")
    demo.add_argument("--mixer", choices=MIXERS, default="gated_deltanet", help="the layer to train (%(default)s)")
    demo.add_argument("--text", metavar="FILE", help="train on this file instead of Python's own help topics")
    demo.add_argument("--seconds", type=float, default=90.0, help="time limit of the training (%(default)g)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", metavar="PNG", default="fla_ops_demo.png", help="the figure (%(default)s)")

    bench = commands.add_parser("bench", help="time every backend beside what people run today, interleaved")
    bench.add_argument("family", nargs="?", choices=OPS, help="one family only")
    bench.add_argument("--all", action="store_true", help="the whole pytest-benchmark suite of a checkout's bench/")
    bench.add_argument("--seconds", type=float, default=2.0, help="per case, short list only (%(default)g)")

    commands.add_parser("build", help="compile the native library, from the sources that came with the package")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 if it failed, 2 for wrong use or a missing extra."""
    args = parser().parse_args(argv)
    try:
        match args.command:
            case "info":
                from .commands.info import run
            case "selftest":
                from .commands.selftest import run
            case "demo":
                from .commands.demo import run
            case "bench":
                from .commands.bench import run
            case "build":
                from .commands.build import run
        return run(args)
    except CommandError as error:
        print(f"fla-ops {args.command}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
