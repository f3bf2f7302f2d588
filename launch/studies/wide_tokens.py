"""megatron-lowbit evaluate --token-ablation: send a share of the tokens in more bits, all others in fewer.

    default                  comm.allocation=adaptive: bits by feature, the same for every token
    <bits> more bits         ... with a larger budget: what a lower KL is worth in bits
    <share> by <score> +1    the tokens of largest score in one bit per value more than the others
    <share> by <score> bf16  ... in bf16

A token's score is what its sender can compute before it sends:

    size             s_t, the token's own size in calibrated standard deviations (kernels/wire_format.py)
    error            sum_f (x^ - x)^2 of the token in the narrower format
    relative error   ... over sum_f x^2

Every rank chooses for itself, the same number of tokens in every message, so that messages keep one size. Both formats
have bits by feature of their own (bit_allocation.py), and a bit per token says which it has. Budgets are such that all
rows but one have the default's bits per value: rounding a site's tiers to whole words loses up to 0.003 of them.

The sums of virtual ranks, exact bytes, but no wire: nothing else sends such messages. KL is to the same weights with
full sums, so that it is of the communication alone; "over default" is the ratio of the two KLs, and its standard error
that of a ratio over the same windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lowbit.adapters import patching
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import adaptive_bits, build_plan, codec_of, num_bf16
from megatron_lowbit.comm.codec import Codec, WireFormat
from megatron_lowbit.comm.collectives.base import as_rows
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, EvaluateConfig, LowBitError
from megatron_lowbit.io.data import Windows
from megatron_lowbit.kernels import BF16_BITS, hybrid_unpack_reduce
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import calibrate_engine, load_windows
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.rows import check_unused
from megatron_lowbit.launch.tables import number, print_table
from megatron_lowbit.quality import Quality, measure_quality, stderr_of_ratio
from megatron_lowbit.runtime.metrics import MetricLogger

COMM = CommConfig(mode="one_shot", drift_threshold=None)
WITHOUT_BF16 = COMM.model_copy(update={"bf16_fraction": 0.0})
MORE_BITS = 1 / 16
SHARES = {"1/64": 1 / 64, "1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4}


class Variant(NamedTuple):
    """share of the tokens that are widened; by: the score; wide: bits per value that they get more, None: bf16."""

    share: float
    by: str
    wide: float | None


VARIANTS = {
    **{
        f"{name} by {by} +1": Variant(s, by, 1)
        for by in ("size", "error", "relative error")
        for name, s in SHARES.items()
    },
    **{f"{name} by error bf16": Variant(SHARES[name], "error", None) for name in ("1/64", "1/16")},
}  # bf16 for a quarter would leave the others less than the narrowest code


class WideTokens(VirtualReducer):
    """one_shot whose ranks, all in one process, each send floor(share * tokens) in `wide` and the others in `narrow`.

    narrow has per-token scales. Counts the bytes of one rank, with a bit per token where there is a choice.
    """

    def __init__(self, narrow: Codec, wide: Codec, share: float, by: str):
        super().__init__(None, "bf16")  # no plan: it does not run the collectives
        self.narrow, self.wide, self.share, self.by = WireFormat(narrow), WireFormat(wide), share, by

    def _forward(self, partials: Sequence[Tensor]) -> Tensor:
        x = partials[0]
        total = torch.zeros_like(as_rows(x), dtype=torch.float32)
        for rank, own in enumerate(partials):
            total += self.sent(as_rows(own), rank)
        tokens, widened = len(total), self.widened(len(total))
        self.traffic.bytes += (tokens - widened) * self.narrow.row_bytes + widened * self.wide.row_bytes
        self.traffic.bytes += -(-tokens // 8) if widened else 0
        self.traffic.values += x.numel()
        return total.view(x.shape).to(x.dtype)

    def widened(self, tokens: int) -> int:
        return int(self.share * tokens)

    def sent(self, rows: Tensor, rank: int) -> Tensor:
        """Return what is decoded of a rank's partial sums float [tokens, E]: float32 [tokens, E]."""
        decoded, message = _decoded(self.narrow, rows, rank)
        score = self.score(rows, decoded, message)
        chosen = torch.sort(score, descending=True, stable=True).indices[: self.widened(len(rows))]
        if len(chosen):
            decoded[chosen] = _decoded(self.wide, rows[chosen], rank)[0]
        return decoded

    def score(self, rows: Tensor, decoded: Tensor, message: Tensor) -> Tensor:
        """Return float64 [tokens]; message: of the narrower format, uint8 [tokens, row_bytes]."""
        if self.by == "size":
            return message[:, 0].double()  # the header, 8 log2 s_t + 128
        error = (decoded - rows).double().square().sum(1)
        return error if self.by == "error" else error / rows.double().square().sum(1)


def _decoded(format: WireFormat, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return what is decoded of one rank's rows, float32, and their message."""
    message = format.pack(rows, rank)
    own = format.of_sender(rank)
    own = own._replace(scale=own.scale.unsqueeze(0), zero_point=own.zero_point.unsqueeze(0))
    return hybrid_unpack_reduce(message.unsqueeze(0), own, torch.float32), message


def default_bits(features: int) -> float:
    """Return the bits per value of the default plan."""
    return COMM.bits + (BF16_BITS - COMM.bits) * num_bf16(features, COMM) / features


def codecs(stats: CalibrationStats, ranks: int, bits: float) -> dict[str, Codec]:
    """Return {site: codec} of `bits` per value over all sites, headers included; 16: bf16."""
    ranges, sums = dict(sorted(stats.ranges[ranks].items())), stats.ranges[1]
    if bits == BF16_BITS:
        ones = {name: torch.ones_like(r.min_vals) for name, r in ranges.items()}
        wide = {name: torch.full(one.shape[1:], BF16_BITS, dtype=torch.uint8) for name, one in ones.items()}
        return {name: Codec(one, torch.zeros_like(one), wide[name]) for name, one in ones.items()}
    chosen = adaptive_bits(ranges, sums, WITHOUT_BF16, bits)
    return {name: codec_of(r, WITHOUT_BF16, chosen[name]) for name, r in ranges.items()}


def makers(stats: CalibrationStats, ranks: int, seed: int) -> dict[str, Callable[[str], VirtualReducer]]:
    """Return {row: makes the reducer of a site}."""
    plan = build_plan(stats, ranks, COMM, seed)
    features = len(next(iter(plan.sites.values())).first.bits)
    bits = default_bits(features)
    reducers: dict[str, Callable[[str], VirtualReducer]] = {
        "default": patching.Reducers.of(Artifact(None, {ranks: plan}), ranks, COMM).virtual
    }
    more = codecs(stats, ranks, bits + MORE_BITS)
    reducers[f"{MORE_BITS:g} more bits"] = lambda site: WideTokens(more[site], more[site], 0.0, "size")
    for name, (share, by, wider) in VARIANTS.items():
        budget = bits - 1 / features  # a bit per token says which format it has
        low = (budget - share * BF16_BITS) / (1 - share) if wider is None else budget - share * wider
        high = BF16_BITS if wider is None else low + wider
        reducers[name] = _maker(codecs(stats, ranks, low), codecs(stats, ranks, high), share, by)
    return reducers


def _maker(
    narrow: Mapping[str, Codec], wide: Mapping[str, Codec], share: float, by: str
) -> Callable[[str], VirtualReducer]:
    return lambda site: WideTokens(narrow[site], wide[site], share, by)


def run_token_ablation(config: EvaluateConfig, logger: MetricLogger) -> dict[str, Any]:
    _check(config)
    engine = start_engine(config, [config.weights])
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    stats = calibrate_engine(engine, config.calibration, [config.virtual_tp], logger, COMM)
    artifact = Artifact(engine.checkpoint)
    engine.apply(artifact, "native")
    full = _measure(engine, windows, config, None)
    rows = [_row("full sums", full, None)]
    default: Quality | None = None
    for name, make in makers(stats, config.virtual_tp, config.seed).items():
        engine.apply(artifact, "native")
        for site, module in patching.row_parallel_modules(engine.model).items():
            module.reducer = make(site)
            module.reducer.set_site(site)
        quality = _measure(engine, windows, config, full.log_probs)
        default = default or quality
        rows.append({**_row(name, quality, default), **_bits(engine)})
        assert quality.kl is not None  # kl_tokens is 1 or more
        logger.log(row=name, perplexity=quality.perplexity, kl=quality.kl)
    engine.remove()
    _print(rows, config)
    return {"rows": rows}


def _check(config: EvaluateConfig) -> None:
    check_unused(config)
    if config.engine != "huggingface" or config.virtual_tp < 2:
        raise LowBitError(
            f"--token-ablation simulates its ranks: set engine=huggingface and virtual_tp to 2 or more, "
            f"not engine={config.engine} virtual_tp={config.virtual_tp}"
        )
    if config.artifact is not None or config.comm != CommConfig():
        raise LowBitError("--token-ablation makes its own plans; leave artifact and comm.* out")
    if config.evaluation.kl_tokens == 0:
        raise LowBitError("--token-ablation compares by KL; leave evaluation.kl_tokens=0 out")


def _measure(engine: Engine, windows: Windows, config: EvaluateConfig, reference: Tensor | None) -> Quality:
    section = config.evaluation
    return measure_quality(engine, windows.batches(section.batch_size), section.kl_tokens, reference)


def _row(name: str, quality: Quality, default: Quality | None) -> dict[str, Any]:
    ratio: tuple[float | None, float | None] = (None, None)
    if default is not None:
        pairs = zip(quality.kl_windows, default.kl_windows, strict=True)
        ratio = stderr_of_ratio([(own[0], other[0]) for own, other in pairs])
    return {
        "name": name,
        "perplexity": quality.perplexity,
        "perplexity_stderr": quality.perplexity_stderr,
        "kl": quality.kl,
        "kl_stderr": quality.kl_stderr,
        "kl_over_default": ratio[0],
        "kl_over_default_stderr": ratio[1],
        "tokens": quality.tokens,
    }


def _bits(engine: Engine) -> dict[str, float]:
    traffic = patching.site_traffic(engine.model).values()
    return {"bits_per_value": 8 * sum(t.bytes for t in traffic) / sum(t.values for t in traffic)}


def _print(rows: list[dict[str, Any]], config: EvaluateConfig) -> None:
    columns = {
        "bits/\nvalue": ("bits_per_value", ".4f"),
        "perplex-\nity": ("perplexity", ".3f"),
        "KL\n(nats)": ("kl", ".6f"),
        "s.e.\n(nats)": ("kl_stderr", ".1g"),
        "over\ndefault": ("kl_over_default", ".3f"),
        "s.e.": ("kl_over_default_stderr", ".3f"),
    }
    cells = [(row["name"], *(number(row.get(key), form) for key, form in columns.values())) for row in rows]
    title = f"{config.model}, virtual_tp={config.virtual_tp}, weights {config.weights.scheme}"
    print_table(("name", *columns), cells, title, "KL to the full sums of the same weights. s.e.: over the windows.")
