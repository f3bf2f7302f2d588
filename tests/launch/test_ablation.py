"""evaluate --ablation: its rows, and that it makes no row twice."""

from __future__ import annotations

import json
import math

import pytest
from commands import CALIBRATION, EVALUATION, run_here
from tiny_models import two_blocks

from megatron_lowbit.config import EvaluateConfig, QuantizeConfig, WeightsConfig
from megatron_lowbit.launch.studies import ablation as study
from megatron_lowbit.launch.studies.ablation import variants

ROWS = ["full", "rtn", "rtn_grouped"]
ROWS += [f"{name}_{gamma}" for name in ("disassembly", "reassembly") for gamma in ("0.01", "0.03", "0.05")]
ROWS += ["adaptive", "correction", "adaptive_correction", "adaptive_branch", "adaptive_hierarchical"]
ROTATED = ["rotation", "+clipping", "+gptq", "+learned", "+correction", "all"]
ROWS += ROTATED
TINY = [*CALIBRATION, "calibration.samples=2", *EVALUATION, "reassembly.expansions=[0.05]", "correction.epochs=1"]
OUTLIERS = ["inject_outliers=32", "inject_at=[norm, up_down, v_o]"]


def rows(folder) -> list[dict]:
    return json.loads((folder / "evaluate.json").read_text())["rows"]


def settings_of(folder, name: str) -> dict:
    """What a row's artifact was made with."""
    return json.loads((folder / "ablation" / name / "row.json").read_text())["settings"]


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    command = ["evaluate", "--ablation", f"model={two_blocks()}", "weights.scheme=W4A4", *OUTLIERS, *TINY]
    command.append(f"output_dir={folder}")
    assert run_here(*command) == 0
    return folder, command


def test_rows(ablation):
    folder, _ = ablation
    found = rows(folder)
    assert [row["name"] for row in found] == ROWS
    assert all(math.isfinite(row["perplexity"]) and row["perplexity"] > 1 for row in found)
    assert found[0]["kl"] == 0 and all(math.isfinite(row["kl"]) and row["kl"] > 0 for row in found[1:])
    assert all(row["injected"] == 32 for row in found[1:])
    assert all(row["kl_stderr"] > 0 and row["perplexity_stderr"] > 0 for row in found[1:])
    assert all(row["evaluate_seconds"] > 0 for row in found) and all(row["quantize_seconds"] > 0 for row in found[1:])
    made = {path.parent.name for path in (folder / "ablation").glob("*/lowbit.json")}
    assert made == set(ROWS[3:]), "what is rounded to nearest alone needs no artifact"
    assert not list((folder / "ablation").glob("*/resume"))


def test_rows_differ_in_what_they_are_about(ablation):
    folder, _ = ablation
    found = {row["name"]: row for row in rows(folder)}
    sure = set(ROWS) - {
        "adaptive_correction",
        "adaptive_branch",
        "adaptive_hierarchical",
    }  # dropped where it lowers no loss
    assert len({found[name]["perplexity"] for name in sure}) == len(sure)
    # Splitting alone widens the inputs, splitting and merging keeps them.
    wide, same = (found[f"{name}_0.05"]["linear_bytes"] for name in ("disassembly", "reassembly"))
    assert wide > same > found["rtn_grouped"]["linear_bytes"] == found["correction"]["linear_bytes"]
    modes = {
        name: settings_of(folder, name)["correction"]["mode"] for name in ("adaptive_branch", "adaptive_correction")
    }
    assert modes == {"adaptive_branch": "branch", "adaptive_correction": "merged"}
    widths = [found[f"disassembly_{gamma}"]["linear_bytes"] for gamma in ("0.01", "0.03", "0.05")]
    assert widths == sorted(widths) and len(set(widths)) == 3


def test_rotated_rows_are_what_they_say(ablation):
    """Each row adds one step to the one before; that of the preset has what the preset has."""
    folder, _ = ablation
    settings = {}
    for name in ROTATED:
        row = settings_of(folder, name)
        weights = [row["weights"][key] for key in ("rotation", "clipping", "rounding")]
        settings[name] = (*weights, row["correction"]["mode"], row["reassembly"]["mode"])
        assert json.loads((folder / "ablation" / name / "lowbit.json").read_text())["rotation"]["residual"]
    assert settings == {
        "rotation": ("hadamard", "none", "nearest", "none", "none"),
        "+clipping": ("hadamard", "mse", "nearest", "none", "none"),
        "+gptq": ("hadamard", "mse", "gptq", "none", "none"),
        "+learned": ("learned", "mse", "gptq", "none", "none"),
        "+correction": ("learned", "mse", "gptq", "merged", "none"),
        "all": ("learned", "mse", "gptq", "merged", "adaptive"),
    }
    best, row = QuantizeConfig(weights={"preset": "best"}), variants(EvaluateConfig())["+learned"]
    assert {key: getattr(best.weights, key) for key in row.weights} == row.weights
    assert (best.reassembly.mode, best.correction.mode) == (row.reassembly.mode, row.correction.mode)


def test_injected_outliers_leave_the_function_alone(ablation, tmp_path):
    folder, command = ablation
    assert run_here("evaluate", command[2], *EVALUATION, f"output_dir={tmp_path}") == 0
    (plain,) = rows(tmp_path)
    assert rows(folder)[0]["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)  # a power of two


def test_a_second_run_makes_no_row_again(ablation):
    folder, command = ablation
    before, files = rows(folder), stamps(folder)
    assert run_here(*command) == 0
    assert stamps(folder) == files
    keys = ("name", "perplexity", "kl", "linear_bytes", "quantize_seconds")
    made = ROWS[3:]  # others are rounded again
    again, first = (
        [[row[key] for key in keys] for row in table if row["name"] in made] for table in (rows(folder), before)
    )
    assert again == first


def stamps(folder) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder / "ablation").rglob("*") if path.is_file()}


def _seconds(text: str) -> str:
    record = json.loads(text)
    record["found"]["seconds"] += 1
    return json.dumps(record)


@pytest.mark.parametrize("change", [_seconds, lambda text: text[:-40]])
def test_a_row_that_was_changed_is_made_again(change, tmp_path, monkeypatch):
    """As one of other settings is, or of another text."""
    made = []

    def quantize(settings):
        made.append(settings.weights.rounding)
        tmp_path.joinpath("lowbit.json").touch()

    def row(name="+gptq", text="text"):
        config = EvaluateConfig()
        weights, variant = WeightsConfig(scheme="W4A4"), variants(config)[name]
        return study.quantized(config, weights, variant, tmp_path, text, quantize)[1]

    monkeypatch.setattr(study.LowBitCheckpoint, "load", lambda folder: folder)
    assert row() == row() and made == ["gptq"]
    file = tmp_path / "row.json"
    file.write_text(change(file.read_text()))
    row()
    assert made == ["gptq"] * 2
    row("+clipping")
    row("+clipping", "another text")
    assert made == ["gptq"] * 2 + ["nearest"] * 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "weights.scheme"),
        (["weights.scheme=W4A4", "virtual_tp=2"], "virtual_tp"),
        (["weights.scheme=W4A4", "artifact=somewhere"], "artifact"),
        (["weights.scheme=W4A4", "weights.preset=best"], "weights.preset"),
    ],
)
def test_refused(more, said, tmp_path, capsys):
    assert run_here("evaluate", "--ablation", "model=embedded", *TINY, *more, f"output_dir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-lowbit: ") and said in line
