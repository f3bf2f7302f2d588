"""What ranks of a RankPool run for test_api.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_lowbit as lowbit


def evaluated(rank: int, size: int, model: Path, artifact: Path, folder: Path, text: dict[str, Any]) -> dict[str, Any]:
    """Rows and record of an evaluation on DeepSpeed, as every rank has them."""
    settings: dict[str, Any] = {"engine": "deepspeed", "tp": size, "dtype": "float32", "evaluation": text}
    result = lowbit.evaluate(model, "stdlib:validation", artifact, folder, **settings)
    return {"rows": result.rows, "record": result.record}


def quantized(rank: int, size: int, model: Path, folder: Path, values: dict[str, Any]) -> None:
    lowbit.quantize(model, "stdlib:calibration", output_dir=folder, tp=size, **values)
