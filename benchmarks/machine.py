"""What every benchmark writes beside its numbers: the machine, and where the results go."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from secateur.result import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """Processor, threads, memory, accelerator."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": psutil.getloadavg()[0],
    }


def store(name: str, results: Mapping[str, object]) -> Path:
    """Write results/NAME.json with the machine, the versions and the date."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}
    path.write_text(json.dumps(record | dict(results), indent=1) + "\n", encoding="utf-8")
    return path
