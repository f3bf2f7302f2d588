"""weights.preset: values of several sections, which give way to what is given."""

from pathlib import Path

import pytest

from megatron_lowbit.config import (
    CorrectionConfig,
    EvaluateConfig,
    QuantizeConfig,
    ReassemblyConfig,
    WeightsConfig,
    load_config,
)

BEST = {"weights": {"rotation": "learned", "clipping": "mse", "rounding": "gptq", "method": "qllm"}}
BEST |= {"reassembly": {"mode": "none"}, "correction": {"mode": "none"}}
PAPERS = {"weights": {"rotation": "none", "clipping": "none", "rounding": "nearest", "method": "qllm"}}
PAPERS |= {"reassembly": {"mode": "adaptive"}}
PAPERS |= {"correction": {"mode": "merged", "epochs": 10, "holdout": 0, "learning_rate": 5e-4, "rank": 4}}


@pytest.mark.parametrize(("preset", "values"), [("best", BEST), ("qllm", PAPERS)])
@pytest.mark.parametrize("stage", [QuantizeConfig, EvaluateConfig])
def test_a_preset_of_weights_reaches_over_sections(preset, values, stage, tmp_path):
    """From a file, an override, a scheme of a file, or Python, with sections as dicts and as models."""
    file = tmp_path / "run.yaml"
    file.write_text(f"weights: {{preset: {preset}, scheme: W4A4}}\n")
    schemes = tmp_path / "schemes.yaml"
    schemes.write_text(f"weights: {{scheme: W4A4}}\nschemes: {{W4A4: {{weights: {{preset: {preset}}}}}}}\n")
    usual = stage()
    for config in (
        load_config(stage, str(file), []),
        load_config(stage, None, [f"weights.preset={preset}"]),
        load_config(stage, str(schemes), []),
        stage(weights={"preset": preset}),
        stage(weights=WeightsConfig(preset=preset), correction=CorrectionConfig()),
    ):
        for section in ("weights", "reassembly", "correction"):
            for key, value in getattr(config, section).model_dump().items():
                if key not in ("preset", "scheme"):
                    expected = values[section].get(key, getattr(getattr(usual, section), key))
                    assert value == expected, f"{section}.{key}"
        assert config.comm == usual.comm


def test_given_keys_win_over_a_preset_of_weights(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("weights: {preset: best}\ncorrection: {mode: merged, epochs: 7}\n")
    for config in (
        load_config(QuantizeConfig, str(file), ["weights.rounding=nearest"]),
        QuantizeConfig(
            weights={"preset": "best", "rounding": "nearest"}, correction=CorrectionConfig(mode="merged", epochs=7)
        ),
    ):
        assert (config.correction.mode, config.correction.epochs) == ("merged", 7)
        assert (config.weights.rounding, config.weights.clipping) == ("nearest", "mse")
        assert config.reassembly.mode == "none"
    assert load_config(QuantizeConfig, str(file), ["weights.preset=none"]).weights == WeightsConfig(scheme="W4A8")


def test_without_a_preset_of_weights_nothing_has_changed():
    config = load_config(QuantizeConfig, None, [])
    assert (config.weights.preset, config.weights.rotation, config.weights.rounding) == (None, "none", "nearest")
    assert (config.reassembly, config.correction) == (ReassemblyConfig(), CorrectionConfig())


def test_the_papers_configs_are_the_papers_preset():
    """weights.preset=qllm is what configs/llama*.yaml say; some of their models have a learning rate of their own."""
    files = sorted((Path(__file__).parents[2] / "configs").glob("llama*.yaml"))
    assert files
    for file in files:
        config = load_config(QuantizeConfig, str(file), [])
        weights = {"preset": "qllm", "scheme": config.weights.scheme, "attention": True}
        preset = QuantizeConfig(weights=weights, correction={"learning_rate": config.correction.learning_rate})
        assert (preset.correction, preset.reassembly) == (config.correction, config.reassembly), file
        assert preset.weights.model_copy(update={"preset": None}) == config.weights, file
