"""sbatch templates that `megatron-lowbit slurm render` fills in: {{name}} is a variable, all else is plain bash."""
