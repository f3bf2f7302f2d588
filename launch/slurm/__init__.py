"""Stages as jobs of a Slurm cluster: `megatron-lowbit slurm render` writes the scripts, `slurm submit` sends them."""
