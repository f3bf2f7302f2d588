"""Configuration: where a value comes from, and one line for everything that can be wrong with it."""

import os
import threading

import pytest
from config_errors import refused

from megatron_lowbit.config import (
    CalibrateConfig,
    CommConfig,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    LowBitError,
    QuantizeConfig,
    defaults,
    errors,
    load_config,
    one_line,
)
from megatron_lowbit.launch.bench.config import BenchmarkConfig
from megatron_lowbit.qllm.resume import State
from megatron_lowbit.quant.affine import Scheme

STAGES = (BenchmarkConfig, CalibrateConfig, DemoConfig, EvaluateConfig, GenerateConfig, QuantizeConfig)


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_valid(stage):
    config = load_config(stage, None, [])
    assert config == stage()
    assert stage.model_validate(config.model_dump()) == config


def test_overrides_reach_nested_keys():
    overrides = ["comm.bits=6", "tp=2", "evaluation.samples=3", "weights.symmetric=true"]
    config = load_config(EvaluateConfig, None, overrides)
    assert (config.comm.bits, config.tp, config.evaluation.samples, config.weights.symmetric) == (6, 2, 3, True)
    assert config.calibration.samples == 128  # untouched, in a section of the same shape


def test_overrides_beat_the_file_and_each_other(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tp: 4\ncomm:\n  bits: 6\n  bf16_fraction: 0.25\nseed: 7\n")
    config = load_config(EvaluateConfig, str(file), ["comm.bits=3", "tp=2", "comm.bits=5"])
    assert (config.comm.bits, config.tp) == (5, 2)  # the last one
    assert (config.comm.bf16_fraction, config.seed) == (0.25, 7)  # the file's
    assert config.comm.selection == "top"  # the default


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(EvaluateConfig, str(tmp_path / "empty.yaml"), []) == EvaluateConfig()


def test_a_config_is_frozen():
    config = load_config(EvaluateConfig, None, [])
    with pytest.raises(ValueError, match="frozen"):
        config.tp = 2
    with pytest.raises(ValueError, match="frozen"):
        config.comm.bits = 2


def test_defaults_lists_every_value_under_its_dotted_key():
    config = load_config(CalibrateConfig, None, ["comm.bits=6"])
    expected = {}
    for key, value in config.model_dump().items():
        expected |= {f"{key}.{name}": leaf for name, leaf in value.items()} if isinstance(value, dict) else {key: value}
    assert defaults(config) == expected
    assert expected["comm.bits"] == 6 and expected["comm.tp_sizes"] is None


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("comm.bitz=4", "comm.bitz", "comm.bits"),
        ("com.bits=4", "com", "comm"),
        ("bits=4", "bits", "comm.bits"),  # the right name in the wrong place
        ("Model=x", "Model", "model"),
        ("output-dir=x", "output-dir", "output_dir"),
    ],
)
def test_unknown_key_names_the_nearest(override, key, nearest):
    assert refused(override) == f"unknown config key {key!r}; did you mean {nearest!r}?"


def test_unknown_key_like_no_other_lists_all():
    message = refused("zzzqqq=1")
    assert message.startswith("unknown config key 'zzzqqq'; valid keys: model, ")
    for key in ("tp", "comm.bits", "evaluation.kl_tokens", "weights.group_size"):
        assert f" {key}," in message + ","


def test_a_key_of_another_stage_is_unknown():
    assert "unknown config key 'evaluation'" in refused("evaluation.samples=3", stage=CalibrateConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.scheme=W4A9", "weights.scheme='W4A9' is not one of none, W4A16, W4A8, W4A4, W6A6, W8A8"),
        ("comm.mode=oneshot", "did you mean 'one_shot'?"),
        (
            "engine=hugging",
            "engine='hugging' is not one of huggingface, deepspeed, megatron; did you mean 'huggingface'?",
        ),
        ("dtype=bf16", "dtype='bf16' is not one of auto, float32, bfloat16; did you mean"),
        ("comm.selection=tops", "did you mean 'top'?"),
        ("weights.method=3", "weights.method=3 is not one of rtn, qllm"),
    ],
)
def test_literal_names_the_nearest(override, message):
    assert message in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("comm.bits=1", "comm.bits=1: input should be greater than or equal to 2"),
        ("comm.bits=9", "comm.bits=9: input should be less than or equal to 8"),
        ("comm.bf16_fraction=-0.1", "comm.bf16_fraction=-0.1: input should be greater than or equal to 0"),
        ("comm.bf16_fraction=1.5", "comm.bf16_fraction=1.5: input should be less than or equal to 1"),
        ("comm.tp_sizes=[2, 1]", "a tensor-parallel size is at least 2"),
        ("tp=0", "tp=0: input should be greater than or equal to 1"),
        ("virtual_tp=-2", "virtual_tp=-2: "),
        ("calibration.samples=0", "calibration.samples=0: "),
        ("calibration.sequence_length=1", "calibration.sequence_length=1: input should be greater than or equal to 2"),
        ("calibration.ema_gamma=0", "calibration.ema_gamma=0: input should be greater than 0"),
        ("calibration.ema_gamma=1.01", "calibration.ema_gamma=1.01: input should be less than or equal to 1"),
        ("evaluation.kl_tokens=-1", "evaluation.kl_tokens=-1: "),
        ("weights.group_size=0", "weights.group_size=0: "),
        ("weights.shard_groups=0", "weights.shard_groups=0: "),
        ("comm.bf16_fraction=nan", "comm.bf16_fraction="),
    ],
)
def test_out_of_range(override, message):
    assert message in refused(override)


@pytest.mark.parametrize("override", ["comm.bits=2", "comm.bits=8", "comm.bf16_fraction=0", "comm.bf16_fraction=1"])
def test_the_ends_of_a_range_are_valid(override):
    load_config(EvaluateConfig, None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tp=two", "tp='two': input should be a valid integer"),
        ("tp=2.5", "tp=2.5: input should be a valid integer"),
        ("comm.tp_sizes=4", "comm.tp_sizes=4: "),
        ("comm.tp_sizes=[2, x]", "comm.tp_sizes.1='x': input should be a valid integer"),
        ("weights.symmetric=perhaps", "weights.symmetric='perhaps': input should be a valid boolean"),
        ("comm=3", "comm=3: "),
        ("comm=null", "comm=None: "),
        ("tp=[1", "tp='[1': "),  # no YAML
    ],
)
def test_wrong_type(override, message):
    assert message in refused(override)


@pytest.mark.parametrize("override", ["tp", "", "=4", "--tp"])
def test_an_override_without_key_or_value(override):
    example = "" if "=" in override else ", such as model=embedded"
    assert refused(override) == f"override {override!r} is not of the form key.path=value{example}"


def test_an_override_below_a_value():
    assert refused("comm.bits=4", "comm.bits.low=4").endswith("'bits' is a value, not a section")
    assert refused("comm=4", "comm.bits=3").endswith("'comm' is a value, not a section")


@pytest.mark.parametrize("override", ["comm.bits.low.high=4", "model.a.b=4"])
def test_an_override_far_below_a_value(override):
    refused(override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"comm: [1", "cannot read config file"),
        (b"a: b: c", "cannot read config file"),
        (b"\xff\xfe\x00", "cannot read config file"),
        (b"- tp\n- 2\n", "must hold keys and values, not list"),
        (b"just text", "must hold keys and values, not str"),
        (b"3", "must hold keys and values, not int"),
        (b"comm:\n  bitz: 4\n", "unknown config key 'comm.bitz'; did you mean 'comm.bits'?"),
        (b"comm:\n  bits: 9\n", "comm.bits=9: input should be less than or equal to 8"),
        (b"1: 2", "keys should be strings"),
    ],
)
def test_bad_file(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert message in refused(file=str(file))


def test_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        message = refused(file=str(path))
        assert message.startswith(f"cannot read config file {str(path)!r}: ")


def test_a_missing_file_is_told_with_the_folder_that_was_looked_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"there is no such file in {str(tmp_path)!r}: give its path" in refused(file="configs/nowhere.yaml")


@pytest.mark.parametrize("text", ["123", "007", "1e3", "true", "[oops", "a: b", "2024-01-01", "key=value", "- x", "{"])
def test_text_stays_what_was_typed(text):
    config = load_config(GenerateConfig, None, [f"prompt={text}", f"model={text}", f"calibration.data={text}"])
    assert config.prompt == config.model == config.calibration.data == text


AS_TYPED = [
    "2024-02-30",
    "null",
    "yes",
    "a: b: c",
    "!!timestamp x",
    "9" * 5000,
    "0x" + "f" * 5000,
    "[" * 2000,
    "é 物語",
]


@pytest.mark.parametrize("text", AS_TYPED, ids=lambda text: text[:12])
def test_a_prompt_is_never_read_as_yaml(text):
    """Dates that do not exist, numbers of 5,000 digits and deep brackets made PyYAML raise what nobody caught."""
    assert load_config(GenerateConfig, None, [f"prompt={text}"]).prompt == text


@pytest.mark.parametrize("text", ["123", "007", "yes", "2024-02-30", "1:30", "1e3", "null"])
def test_text_in_a_file_is_text_without_quotes(tmp_path, text):
    (tmp_path / "run.yaml").write_text(f"prompt: {text}\nmax_new_tokens: 3\n")
    config = load_config(GenerateConfig, str(tmp_path / "run.yaml"), [])
    assert (config.prompt, config.max_new_tokens) == (text, 3)
    (tmp_path / "run.yaml").write_text(f"model: {text}\n")
    model = load_config(GenerateConfig, str(tmp_path / "run.yaml"), []).model
    assert model == (None if text == "null" else text)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=2024-02-30", "seed='2024-02-30': input should be a valid integer"),
        ("seed=1:30", "seed='1:30': input should be a valid integer"),  # YAML 1.1: 90
        ("seed=!!timestamp x", "input should be a valid integer"),
        ("seed=!!bool x", "input should be a valid integer"),
        ("seed=" + "9" * 5000, "exceeded maximum size"),
        ("tp=0x" + "f" * 5000, "tp=an integer of 20000 bits: is beyond 64 bits"),
        ("tp=" + "9" * 30, "is beyond 64 bits; give a smaller number"),
        ("tp=" + "[" * 3000, "input should be a valid integer"),
        ("tp={a: 1, a: 2}", "input should be a valid integer"),
        ("prompt=a\0b", "prompt='a\\x00b': holds a NUL character"),
        ("model=a\0b", "model='a\\x00b': holds a NUL character"),
        ("prompt=\udcff", "prompt='\\udcff': "),
        ("output_dir=\ud800", "output_dir='\\ud800': "),
        ("a" * 10_000 + "=1", "valid keys: "),
        ("a" * 10_000, "is not of the form key.path=value"),
        ("tp" + ".a" * 5000 + "=1", "is not of the form key.path=value"),
    ],
    ids=lambda text: text[:16].encode("unicode_escape").decode(),
)
def test_values_that_broke_their_readers(override, said):
    message = refused(override, stage=GenerateConfig)
    assert said in message and len(message) < 2500
    message.encode()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, "with its aliases it holds more than 20,000 values"),
        ("architecture:\n  " + BOMB.replace("\n", "\n  "), "with its aliases it holds more than 20,000 values"),
        ("architecture: &a {b: *a}", "an alias in line 1 contains itself"),
        ("architecture: " + "[" * 40 + "]" * 40, "nested more than 32 levels deep"),
        ("[" * 5000, "it is nested too deeply"),
        ("# " + "x" * 2**18, "it is longer than 262,144 characters"),
        ("tp: 2\nseed: 1\ntp: 4\n", "key 'tp' is given twice, again in line 3"),
        ("comm: {bits: 4, bits: 5}", "key 'bits' is given twice, again in line 1"),
        ("tp: !!int x", "not a value of YAML: invalid literal for int"),
        ("tp: [1", "in line 1, column 7"),
    ],
    ids=lambda text: text[:20],
)
def test_files_that_broke_their_reader(tmp_path, content, said):
    (tmp_path / "run.yaml").write_text(content)
    message = refused(stage=QuantizeConfig, file=str(tmp_path / "run.yaml"))
    assert message.startswith("cannot read config file ") and said in message


def test_aliases_within_bounds(tmp_path):
    (tmp_path / "run.yaml").write_text("calibration: &text {data: a.txt, samples: 3}\nevaluation: *text\n")
    config = load_config(EvaluateConfig, str(tmp_path / "run.yaml"), [])
    assert config.calibration.samples == config.evaluation.samples == 3
    assert config.evaluation.data == "a.txt"


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "x" * 5000])
def test_a_config_that_is_no_file(path):
    assert refused(file=path).startswith("cannot read config file ")


def test_a_pipe_can_be_read_once_but_is_parsed_twice(tmp_path):
    """As --config <(...): the arguments are checked before the imports, and parsed again after them."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("tp: 2\n",), daemon=True)
    writer.start()
    assert [load_config(EvaluateConfig, str(pipe), []).tp for _ in range(2)] == [2, 2]
    writer.join(300)


@pytest.mark.parametrize(
    "override", ["weights.scheme=W3A3", "engine=vllm", "comm.mode=ring", "comm.selection=x", "dtype=int8"]
)
def test_nothing_is_suggested_for_what_is_no_slip(override):
    message = refused(override)
    assert "is not one of" in message and "did you mean" not in message


@pytest.mark.parametrize("text", ["null", "none", ""])
def test_optional_text_can_be_unset(text):
    assert load_config(DemoConfig, None, [f"model={text}", f"calibration.data={text}"]).model is None


@pytest.mark.parametrize("text", ["null", "none", ""])
def test_none_switches_numbers_and_choices_off_too(text):
    config = load_config(EvaluateConfig, None, [f"comm.drift_threshold={text}", f"weights.method={text}"])
    assert config.comm.drift_threshold is None and config.weights.method is None
    assert load_config(EvaluateConfig, None, ["weights.scheme=none"]).weights.scheme == "none", "a scheme's name"


def test_null_unsets_other_values():
    config = load_config(QuantizeConfig, None, ["weights.group_size=null", "comm.mode=null"])
    assert config.weights.group_size is None and config.comm.mode is None


def test_an_empty_prompt():
    assert refused("prompt=", stage=GenerateConfig).startswith("prompt=")


@pytest.mark.parametrize("value", ["off", "offline", "online"])
def test_every_value_of_wandb_can_be_given(tmp_path, value):
    assert load_config(EvaluateConfig, None, [f"wandb={value}"]).wandb == value
    (tmp_path / "run.yaml").write_text(f"wandb: {value}\n")
    assert load_config(EvaluateConfig, str(tmp_path / "run.yaml"), []).wandb == value


def test_one_line():
    assert one_line(ValueError("\n  first \nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("name", "weight_bits", "act_bits"),
    [("none", 16, 16), ("W4A16", 4, 16), ("W4A8", 4, 8), ("W2A2", 2, 2), ("W8A8", 8, 8), ("W16A8", 16, 8)],
)
def test_scheme(name, weight_bits, act_bits):
    assert Scheme.parse(name) == Scheme(weight_bits, act_bits)


@pytest.mark.parametrize("name", ["", "W4", "4A8", "A8W4", "w4a8", "W4A8 ", "WxA8", "W4A", "W-4A8", "W4.0A8", "None"])
def test_scheme_of_another_form(name):
    with pytest.raises(LowBitError, match="is not of the form W4A8"):
        Scheme.parse(name)


@pytest.mark.parametrize(("name", "bits"), [("W1A8", 1), ("W9A8", 9), ("W4A9", 9), ("W4A32", 32), ("W0A8", 0)])
def test_scheme_with_other_bits(name, bits):
    with pytest.raises(LowBitError, match=rf"num_bits={bits} is not in 2\.\.8"):
        Scheme.parse(name)


def test_a_preset_gives_way_to_what_is_given(tmp_path):
    """preset=paper is static ranges and uniform bits, from a file, an override or code; given keys win in any order."""
    best = load_config(EvaluateConfig, None, []).comm
    assert (best.preset, best.scale, best.allocation) == ("best", "per_token", "adaptive")
    file = tmp_path / "paper.yaml"
    file.write_text("comm:\n  preset: paper\n")
    for paper in (
        load_config(EvaluateConfig, str(file), []).comm,
        load_config(EvaluateConfig, None, ["comm.preset=paper"]).comm,
        load_config(EvaluateConfig, None, ["comm.preset='paper'"]).comm,
        load_config(EvaluateConfig, None, ["comm.preset=best", "comm.preset=paper"]).comm,
        CommConfig(preset="paper"),
    ):
        assert (paper.scale, paper.allocation, paper.bits, paper.bf16_fraction) == ("static", "uniform", 4, 1 / 64)
    for overrides in (["comm.scale=per_token", "comm.preset=paper"], ["comm.preset=paper", "comm.scale=per_token"]):
        mixed = load_config(EvaluateConfig, None, overrides).comm
        assert (mixed.scale, mixed.allocation) == ("per_token", "uniform")
    assert load_config(EvaluateConfig, str(file), ["comm.preset=best"]).comm == best, "the last one counts"
    assert load_config(EvaluateConfig, str(file), ["comm.allocation=adaptive"]).comm.allocation == "adaptive"
    with pytest.raises(LowBitError, match="selection=random chooses bf16 features"):
        load_config(EvaluateConfig, None, ["comm.selection=random"])


def test_symmetric_weights_have_no_zero_point():
    with pytest.raises(
        LowBitError, match=r"weights: zero_point=real has no effect with symmetric=true; leave one of them"
    ):
        load_config(EvaluateConfig, None, ["weights.symmetric=true", "weights.zero_point=real"])
    assert load_config(EvaluateConfig, None, ["weights.zero_point=real"]).weights.real_zero


@pytest.mark.parametrize("others", [[], ["comm.preset=paper", "comm.clipping=histogram"]])
def test_symmetric_ranges_are_the_papers(others):
    with pytest.raises(LowBitError, match=r"symmetric=true is of ranges as they were seen; set comm\.preset=paper"):
        load_config(EvaluateConfig, None, [*others, "comm.symmetric=true"])
    assert load_config(EvaluateConfig, None, ["comm.preset=paper", "comm.symmetric=true"]).comm.symmetric


def test_the_first_name_of_per_token_still_works(tmp_path, caplog):
    """comm.scale was `rank1` once: from a file, an override or Python it is per_token, which is said once."""
    errors.notice.cache_clear()
    file = tmp_path / "run.yaml"
    file.write_text("comm:\n  scale: rank1\n")
    for comm in (
        load_config(EvaluateConfig, str(file), []).comm,
        load_config(EvaluateConfig, None, ["comm.scale=rank1"]).comm,
        CommConfig(scale="rank1"),
    ):
        assert comm == CommConfig(scale="per_token")
    said = [record.message for record in caplog.records]
    assert said == ["comm.scale=rank1 is now called comm.scale=per_token; both mean the same"]
    assert load_config(EvaluateConfig, None, ["comm.preset=paper", "comm.scale=rank1"]).comm.scale == "per_token"
    assert refused("comm.scale=rank2") == "comm.scale='rank2' is not one of static, per_token"


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "0", errors.NOTICED: "1"}])
def test_a_notice_is_given_once_for_all_ranks(variables, caplog, monkeypatch):
    """By rank 0, or by the process that has started the ranks."""
    errors.notice.cache_clear()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert CommConfig(scale="rank1").scale == "per_token" and not caplog.records


def test_states_of_unfinished_runs_keep_the_first_name(tmp_path):
    """A run that was begun with scale=rank1 is continued, and its parts keep the names that the settings give them."""
    config = load_config(CalibrateConfig, None, [f"output_dir={tmp_path}"])
    assert config.comm.scale == "per_token"
    assert State("calibrate", config, {}).settings["comm.scale"] == "rank1"
