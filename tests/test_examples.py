"""Each script of examples/ as a user starts it: real processes (warm ones), the embedded model, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import needs_deepspeed, needs_megatron, run_here, run_there
from pages import ROOT, commands
from slurm_lab import SlurmLab, why_not

EXAMPLES = ROOT / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        pytest.param("huggingface_virtual_tp.py", [], id="huggingface"),
        pytest.param("deepspeed_tp2.py", TORCHRUN, id="deepspeed", marks=needs_deepspeed),
        pytest.param("megatron_tp2.py", TORCHRUN, id="megatron", marks=needs_megatron),
    ],
)
def test_a_script(script, launcher, embedded_artifact):
    """Messages are low-bit at both linears of six blocks, logits are others with them, and the same again without."""
    command = [sys.executable, *launcher, str(EXAMPLES / script), str(embedded_artifact)]
    code, stdout, stderr = run_there(*command)
    assert code == 0, stderr
    lines = stdout.splitlines()
    assert "sites with low-bit messages: 12" in lines and "after remove: as before" in lines
    change = next(line for line in lines if line.startswith("largest change of a logit: "))
    assert float(change.rpartition(" ")[2]) > 0


def test_scripts_are_short_and_said_how_to_start():
    """The pages and each script's own first lines start it in the same way."""
    for script in EXAMPLES.glob("*.py"):
        text = script.read_text()
        assert len(text.splitlines()) <= 60, script.name
        assert f"examples/{script.name} runs/example" in text, script.name
    words = [word for command in commands() for word in command.words]
    started = {word for word in words if word.endswith(".py") and not word.startswith("Megatron-LM/")}
    assert started == {"examples/deepspeed_tp2.py", "examples/megatron_tp2.py"}


PIPELINE = EXAMPLES / "slurm" / "pipeline.yaml"


def test_slurm_scripts_are_rendered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_here("slurm", "render", PIPELINE, "output_dir=scripts") == 0
    scripts = sorted(file for file in Path("scripts").iterdir() if file.is_file())
    assert [script.name for script in scripts] == ["chain.sh", "evaluate.sbatch", "quantize.sbatch"]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True, timeout=300)


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_slurm_jobs(tmp_path, monkeypatch, capsys):
    """Both jobs, on a Slurm of the tests' own, end well, the second on what the first has written."""
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        lab = SlurmLab(Path(folder))
        try:
            lab.start()
            here = [f"python={sys.executable}", "setup=[export MASTER_ADDR=127.0.0.1]"]  # nobody resolves the nodes
            with patch.dict(os.environ, lab.environ, clear=True):
                assert run_here("slurm", "submit", PIPELINE, *here) == 0
            told = capsys.readouterr().out.splitlines()
            ids = dict(line.split() for line in told if not line.startswith("wrote "))
            assert list(ids) == ["quantize", "evaluate"]
            logs = tmp_path / "runs" / "slurm" / "example" / "logs"
            for stage, number in ids.items():
                ended = lab.ended(number)["JobState"]
                assert ended == "COMPLETED", [log.read_text() for log in logs.glob(f"*{stage}*")]
        finally:
            lab.stop()
    (row,) = json.loads((tmp_path / "runs/slurm/example/evaluation/evaluate.json").read_text())["rows"]
    assert row["weights"] == "W4A4"
