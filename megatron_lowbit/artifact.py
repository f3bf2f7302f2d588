"""Files: CalibrationStats, CommPlan and LowBitCheckpoint, each as safetensors + JSON. The only module that opens any.

    <folder>/calibration.{safetensors,json}     per-feature ranges of every row-parallel site, per tensor-parallel size
    <folder>/comm_plan_tp<N>.{safetensors,json} what N ranks send at every site
    <folder>/lowbit*.safetensors, lowbit.json   packed weights under Hugging Face names, whole (unsharded) tensors
    <folder>/config.json, tokenizer...          and generation_config.json, where the model has one, so that the folder
                                                loads without the original model

Each file is written under a temporary name and renamed, the JSON last: an artifact exists when its JSON does. The JSON
holds the checksums of the tensor files and of itself, lowbit.json also those of config and tokenizer, and the model's
fingerprint, so an artifact that was changed, or of another model, is refused. What a file holds is checked when it is
read, tensor by tensor, also where all checksums agree: shapes, dtypes and indices that do not go together are one
LowBitError that names the tensor and the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_lowbit.comm.plan import CommPlan, plan_sizes
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.tensors import short_repr
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint


@dataclass(frozen=True)
class Artifact:
    """A folder that `megatron-lowbit calibrate` or `quantize` wrote: what the apply_to_* functions put into a model.

    Args:
        checkpoint: the packed weights of the whole, unsharded model; None: weights stay in full precision.
        plans: {tp_size: what that many ranks send at every site}; empty: partial sums travel in full precision.
        folder: where it was read from; None for one that was made in memory.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> artifact = lowbit.Artifact.load("artifact")
        >>> artifact.checkpoint.scheme_name
        'W4A8'
        >>> sorted(artifact.plans)
        [2]
        >>> len(artifact.plan(2).sites)
        4
    """

    checkpoint: LowBitCheckpoint | None = None
    plans: dict[int, CommPlan] = field(default_factory=dict)
    folder: Path | None = None

    __repr__ = short_repr

    @classmethod
    def load(cls, folder: str | Path) -> Artifact:
        """Read the checkpoint and all plans that a folder holds.

        Args:
            folder: with lowbit.json, comm_plan_tp<N>.json, or both, and the tensor files that these describe.

        Returns:
            The Artifact. Its tensors are mapped from their files: pages come into memory as they are used.

        Raises:
            LowBitError: the folder is not there or holds neither, or a file is missing, damaged or was changed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise LowBitError(f"artifact folder {str(folder)!r} does not exist; write one with calibrate or quantize")
        for file in sorted([*folder.glob("lowbit*.safetensors"), *folder.glob("comm_plan_tp*.safetensors")]):
            described = "lowbit.json" if file.name.startswith("lowbit") else f"{file.stem}.json"
            if not (folder / described).exists():
                raise LowBitError(
                    f"{str(folder)!r} holds {file.name} without {described}: its writing was interrupted, or the file "
                    "is lost; run that command again, or delete what is there"
                )
        checkpoint = LowBitCheckpoint.load(folder) if (folder / "lowbit.json").exists() else None
        sizes = plan_sizes(folder)
        if checkpoint is None and not sizes:
            raise LowBitError(
                f"{str(folder)!r} holds no lowbit.json and no comm_plan_tp*.json; run calibrate or quantize"
            )
        return cls(checkpoint, {size: CommPlan.load(folder, size) for size in sizes}, folder)

    def plan(self, tp_size: int) -> CommPlan:
        """Return the plan for a number of ranks.

        Args:
            tp_size: tensor-parallel ranks.

        Returns:
            The CommPlan that was calibrated for them.

        Raises:
            LowBitError: there is none for this size; the message names those that there are.
        """
        if tp_size not in self.plans:
            raise LowBitError(
                f"no communication plan for tp_size {tp_size} (there are {sorted(self.plans)}); "
                f"run calibrate with comm.tp_sizes=[{tp_size}]"
            )
        return self.plans[tp_size]
