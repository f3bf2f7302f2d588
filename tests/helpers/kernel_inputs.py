"""Plans and partial sums with all that is awkward, and what it means that two kernels agree on them."""

from collections.abc import Callable

import torch

from megatron_lowbit.kernels import Format, hybrid, wire_format

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Plan:
    """Qparams of some ranks, and their partial sums with all that is awkward."""

    def __init__(self, tiers: list[int], tokens: int, per_token: bool, dtype: torch.dtype, ranks: int, shuffled=False):
        features = sum(tiers[1::2])
        g = torch.Generator().manual_seed(100 * features + 10 * tokens + ranks)
        self.tiers, self.per_token = tiers, per_token
        place = torch.randperm(features, generator=g)
        tier_of = torch.arange(len(tiers) // 2).repeat_interleave(torch.tensor(tiers[1::2]))[place]
        self.order = place if shuffled else torch.sort(tier_of, stable=True).indices
        bits = torch.empty(features, dtype=torch.int64)
        bits[self.order] = torch.tensor(tiers[::2]).repeat_interleave(torch.tensor(tiers[1::2]))
        levels = 2.0 ** bits.clamp(max=8) - 1
        self.scale = 4 / levels * (0.5 + torch.rand(ranks, features, generator=g))  # some values lie beyond 2 scales
        self.zero_point = (levels / 2).round() + torch.randint(0, 2, (ranks, features), generator=g) / 2
        self.scale[:, bits == 16], self.zero_point[:, bits == 16] = torch.inf, 0.0
        x = torch.randn(ranks, tokens, features, generator=g)
        x[:, :, features // 2 :] *= 4  # groups are unlike
        x[:, 1::7] = 0.25 * self.scale[:, None].nan_to_num(posinf=1.0)  # halfway between codes, now and then
        x[:, 2::7] = -0.0
        x[:, :, features // 2] = 0.5  # a constant feature
        if tokens > 8:
            x[0, 4, features // 3] = torch.nan
            x[-1, 5, 0] = torch.inf
            x[-1, 6, -1] = -torch.inf
            x[:, 7] = 3e38 if dtype in (torch.float32, torch.float64) else 6e4  # saturates everywhere
            x[:, 8] *= 1e-39  # subnormal
        self.x = x.to(dtype)

    def qparams(self, rank):
        return self.scale[rank], self.zero_point[rank], self.order, self.tiers, self.per_token

    def messages(self) -> torch.Tensor:
        packed = [hybrid.pack_reference(x, Format(*self.qparams(rank)))[0] for rank, x in enumerate(self.x)]
        return torch.stack(packed)


def one_nan(message: torch.Tensor, tiers: list[int], per_token: bool) -> torch.Tensor:
    """The message with one NaN for all: torch's casts make different ones, by where a value lies in its tensor."""
    message, header = message.clone(), wire_format.header_bytes(tiers, per_token)
    parts = [(header + byte, size) for bits, _, _, byte, size in wire_format.tier_slices(tiers) if bits == 16]
    for start, size in parts:
        words = message[:, start : start + size].clone(memory_format=torch.contiguous_format).view(torch.int16)
        words[words.view(torch.bfloat16).isnan()] = 0x7FC0
        message[:, start : start + size] = words.view(torch.uint8)
    return message


def assert_same_messages(ours, reference, tiers, per_token):
    assert ours[1].dtype == torch.int64 and torch.equal(ours[1], reference[1])
    assert ours[0].dtype == torch.uint8 and ours[0].shape == reference[0].shape
    assert torch.equal(one_nan(ours[0], tiers, per_token), one_nan(reference[0], tiers, per_token))


def assert_same_bits(ours, reference):
    assert ours.dtype == reference.dtype and torch.equal(ours.isnan(), reference.isnan())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    ours, reference = (t.masked_fill(t.isnan(), 0).view(integers) for t in (ours, reference))
    assert torch.equal(ours, reference)


def check_all(every: list, check: Callable[..., None]) -> None:
    """Call check(*case) for each; prints how many there were, or ends with the first that differs, named."""
    for case in every:
        try:
            check(*case)
        except AssertionError as error:
            raise AssertionError(case) from error
    print(len(every))
