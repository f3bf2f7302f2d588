#!/usr/bin/env bash
# Submits all stages, each to start when the one before has succeeded; prints `stage job-id`. If sbatch refuses one, those
# before it are cancelled. A stage whose predecessor fails is cancelled too (--kill-on-invalid-dep in its script).
set -eo pipefail
cd {{output_dir}}
jobs=()
trap 'if [ $? -ne 0 ] && [ "${#jobs[@]}" -gt 0 ]; then scancel "${jobs[@]}"; fi' EXIT

submit() { # stage, options of sbatch...
  local stage=$1
  shift
  job=$(sbatch --parsable "$@" "$stage.sbatch")
  job=${job%%;*} # a cluster's name may follow the id
  jobs+=("$job")
  echo "$stage $job"
}

{{submissions}}
