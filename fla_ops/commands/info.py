# SPDX-License-Identifier: Apache-2.0
"""`fla-ops info`: what this machine has, and which backend runs each op on it."""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

import fla_ops
from fla_ops._native import levels, load


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def collect() -> dict:
    """Everything `info` prints, as one JSON-ready object."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "fla_ops": fla_ops.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "level": levels.current(),
            "levels": list(levels.available()),
        },
        "devices": [torch.cuda.get_device_name(i) for i in cuda],
        "native_library": load() or "loaded",
        "ops": fla_ops.backends(),
    }


def run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    cpu = found["cpu"]
    print(f"fla_ops {found['fla_ops']}, torch {found['torch']}, triton {found['triton'] or 'not installed'}")
    print(f"Python {found['python']}, {found['platform']}")
    print(f"CPU: {cpu['name']}, {cpu['threads']} threads, kernel level {cpu['level'] or '-'}")
    print(f"GPU: {', '.join(found['devices']) or 'none'}")
    print(f"native library: {found['native_library']}")
    for op, row in found["ops"].items():
        print(f"\n{op}\n  CPU tensors: {row['cpu']}\n  CUDA tensors: {row['cuda'] or '- (no CUDA device)'}")
        for name, reason in row["why_not"].items():
            print(f"  {name} cannot run here: {reason}")
    return 0
