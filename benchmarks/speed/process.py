"""One measurement in a process of its own: `python -m benchmarks.speed.process '{"job": MODULE, ...}'`.

The allocator is told to keep what it has: otherwise every large tensor is mapped and cleared anew by the kernel, which
costs the side most that allocates most (plain Transformers 391 ms instead of 305 in one case). Where bytes are
measured it is left as it is: told to keep everything, it keeps holes too, and a peak of 1.1 units becomes 1.5.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def measured(job: str, *, threads: int, package: str = "benchmarks.speed", **options: Any) -> Any:
    """What `PACKAGE.JOB.measure(**options)` returns in a new process with so many threads.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    request = {"job": f"{package}.{job}", "threads": threads, "options": options}
    allocator = {} if job == "peak" else ALLOCATOR
    result = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, **allocator, **QUIET, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
    )
    if result.returncode:
        raise RuntimeError(f"{job} {options} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    request = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(request["threads"])
    job = importlib.import_module(request["job"])
    print(json.dumps(job.measure(**request["options"])))


if __name__ == "__main__":
    main()
