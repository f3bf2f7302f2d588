"""What a collective is, and the registry that reducers find it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from megatron_lowbit.comm.agreement import Agreement
from megatron_lowbit.comm.codec import WireFormat
from megatron_lowbit.comm.exchange import Exchange
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.config import LowBitError

Drifted = Callable[[], bool]  # a collective call: whether the values that were encoded lie too far beyond their ranges
FormatT = TypeVar("FormatT", bound=nn.Module)
CollectiveT = TypeVar("CollectiveT", bound="type[Collective]")
COLLECTIVES: dict[str, type[Collective]] = {}


def register(name: str) -> Callable[[CollectiveT], CollectiveT]:
    """Return a class decorator that enters a Collective under the name that comm.mode gives it."""

    def add(collective: CollectiveT) -> CollectiveT:
        COLLECTIVES[name], collective.name = collective, name
        return collective

    return add


@dataclass
class Traffic:
    """Counts of the bytes that one rank handed to torch.distributed, and of the values they stand for."""

    bytes: int = 0
    values: int = 0

    def count(self, message: Tensor, values: int = 0) -> None:
        self.bytes += message.nbytes
        self.values += values

    @property
    def bits_per_value(self) -> float:
        return 8 * self.bytes / self.values if self.values else 0.0


@dataclass(frozen=True)
class Ranks:
    """The ranks of a tensor-parallel group, of which this process is `rank`, and what it has sent them."""

    agreement: Agreement
    rank: int
    size: int
    traffic: Traffic

    def exchange(self) -> Exchange:
        return Exchange(self.agreement)


class Formats(nn.Module):
    """The message formats of a site's plan. Each is made when a collective asks for it, and is shared by those that do,
    because a format counts what it encodes."""

    def __init__(self, site_plan: SitePlan | None):
        super().__init__()
        self.site_plan, self.by_name = site_plan, nn.ModuleDict()

    @property
    def plan(self) -> SitePlan:
        assert self.site_plan is not None, "a collective with low_bit = False asks for no format"
        return self.site_plan

    def first(self) -> WireFormat:
        """Return the format of every rank's partial sums."""
        return self.get("first", lambda: WireFormat(self.plan.first))

    def second(self) -> WireFormat:
        """Return the format of their sum. Raises LowBitError where its ranges are not known."""
        second = self.plan.second
        if second is None:
            raise LowBitError("the communication plan has no ranges of the sum, which two_shot needs; calibrate again")
        return self.get("second", lambda: WireFormat(second, self.plan.tp_size))

    def get(self, name: str, make: Callable[[], FormatT]) -> FormatT:
        """Return the format of this name, made by `make` where nobody has asked for it yet."""
        if name not in self.by_name:
            self.by_name[name] = make()
        return self.by_name[name]  # type: ignore[return-value]


class Collective(ABC):
    """One way to add up partial sums over N ranks. Its methods return None where `drifted` said so after encoding:
    nothing is made of these codes then, and the reducer sends the values in bf16.

    A subclass registers itself, takes the formats it needs from `formats`, and counts in `traffic` what it hands to
    torch.distributed. `drifted` is None in most calls: ask it, where it is not, once all values are encoded.
    """

    name: ClassVar[str]
    low_bit: ClassVar[bool] = True  # False: of the values themselves, without a plan
    scatters: ClassVar[bool] = True  # False: its reduce_scatter is no half of its all_reduce, whose cost says nothing

    def __init__(self, formats: Formats):
        self.formats = formats

    @classmethod
    def possible(cls, plan: SitePlan) -> bool:
        """Return whether the plan has what this collective needs."""
        return True

    @abstractmethod
    def all_reduce(self, x: Tensor, ranks: Ranks, reuse: bool, drifted: Drifted | None) -> Tensor | None:
        """Return the sum over all ranks of their x [..., E], in x's dtype, the same bits on every rank.

        reuse: x is not needed any more, so the sum may be made in its place.
        """

    @abstractmethod
    def reduce_scatter(self, x: Tensor, ranks: Ranks, drifted: Drifted | None) -> Tensor | None:
        """Return rank r's slice r of the sum [length / N, ..., E] of all ranks' x [length, ..., E]."""

    @abstractmethod
    def simulate(self, partials: Sequence[Tensor], traffic: Traffic, drifted: Drifted | None) -> Tensor | None:
        """Return what all_reduce gives on N ranks that hold `partials` [..., E], bit for bit; traffic: of one rank."""

    @abstractmethod
    def link_bytes(self, tokens: int, features: int, ranks: int) -> float:
        """Return the bytes that one rank has to send or receive, whichever is more, in an all_reduce."""


def as_rows(x: Tensor) -> Tensor:
    """Return x [..., E] as [tokens, E]."""
    return x.reshape(-1, x.shape[-1])
