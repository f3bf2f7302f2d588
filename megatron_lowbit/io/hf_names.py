"""The tensors of a checkpoint under the names that a model of transformers has for them, read one by one.

Between the file and the model transformers renames, splits, fuses and stacks (its conversion_mapping): embed_out is
lm_head, the experts' w1 and w3 are one gate_up_proj. What it does to a whole checkpoint is done here to the tensors of
one parameter, with its own rules.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.io.hf_weights import HFWeights


@dataclass(eq=False)
class _Origin:
    """The sources of a parameter. first: the parameter's name, or of several made together the first one's;
    sources: {pattern of the converter: names in the files}; converter: None where the one source is it already."""

    first: str
    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


class ModelWeights:
    """The weights in `folder` under the names of `model`, which may be on the meta device. Errors as of HFWeights."""

    def __init__(self, folder: str | Path, model: Any):
        self.stored, self.model = HFWeights(folder), model
        prefix = prefix_mapping(model, self.stored.files)
        self.origins, self.unknown = _origins(model, self.stored.files, prefix)
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():  # one of the two may be stored
            for here, there in ((target, source), (source, target)):
                if here not in self.origins and there in self.origins:
                    self.origins[here] = self.origins[there]
        self._converted: tuple[_Origin | None, dict[str, Tensor]] = (None, {})

    def digest(self) -> str:
        return self.stored.digest()

    def read(self, name: str, shape: torch.Size, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the parameter `name`, or its slice start:stop along `dim`, in the dtype it is stored in."""
        if name not in self.origins:
            raise LowBitError(lacking(self.stored.folder, [name], self.unknown, self.model))
        origin = self.origins[name]
        if origin.converter is None:
            return self.stored.read(origin.names[0], shape, dim, start, stop)
        tensor = self._convert(origin).get(name)
        if tensor is None or tensor.shape != shape:
            found = "nothing" if tensor is None else list(tensor.shape)
            raise LowBitError(
                f"{origin.names[0]} and its like make {found} of {name}, the config asks for {list(shape)}"
            )
        return tensor[tuple([slice(None)] * dim + [slice(start, stop)])]

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Raise LowBitError where one of these parameters of the model is not stored in full precision."""
        self.stored.check_dtypes(
            source for name in names if name in self.origins for source in self.origins[name].names
        )

    def unties(self) -> bool:
        """Tell whether two tensors that the config ties are stored with different values."""

        def value(name: str) -> Tensor:
            return self.read(name, self.model.get_parameter(name).shape)

        return unties(self.model, self.origins, value)

    def _convert(self, origin: _Origin) -> dict[str, Tensor]:
        """Return {name: tensor} of all that is made of the same tensors; the last one is kept, for its other names."""
        if self._converted[0] is not origin:
            self._converted = (None, {})
            converter = copy.deepcopy(origin.converter)
            for pattern, names in origin.sources.items():
                for name in names:
                    converter.add_tensor(origin.first, name, pattern, self.stored.whole(name))
            try:
                converted = converter.convert(origin.first, model=self.model, config=self.model.config)
            except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                why = one_line(error)
                raise LowBitError(f"cannot make {origin.first} of {origin.names[0]} and its like: {why}") from None
            self._converted = (origin, {name: t[0] if isinstance(t, list) else t for name, t in converted.items()})
        return self._converted[1]


def unties(model: Any, known: Collection[str], value: Callable[[str], Tensor]) -> bool:
    """Tell whether a weight that the config ties to another is stored too, with values of its own: transformers 5 then
    ties nothing, and uses both."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return any(
        target in known and source in known and target != source and not torch.equal(value(target), value(source))
        for target, source in tied.items()
    )


def untie(hf_config: Any) -> None:
    """Have models of this config hold a language-model head of their own."""
    for config in (hf_config, getattr(hf_config, "text_config", None)):
        if config is not None:
            config.tie_word_embeddings = False


def prefix_mapping(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Return transformers' key_mapping that removes what stands before all names of a wrapped model (`_orig_mod.`,
    `module.`, `language_model.`); empty where transformers finds the names without it."""
    tail = _name_of(model, model.get_input_embeddings().weight)
    if tail is None or tail in _origins(model, stored, {})[0]:
        return {}
    short = tail.removeprefix(f"{model.base_model_prefix}.")
    for key in stored:
        for end in (tail, short):
            if key.endswith(f".{end}"):
                mapping = {f"^{re.escape(key.removesuffix(end))}": ""}
                if tail in _origins(model, stored, mapping)[0]:
                    return mapping
    return {}


def lacking(folder: str | Path, missing: Collection[str], unknown: Collection[str], model: Any) -> str:
    """Return what to say of a checkpoint without these parameters. unknown: what it holds, and the model has no place
    for."""
    count = f"{len(missing)} weights, the first " if len(missing) > 1 else "the weight "
    what = f"{str(folder)!r} lacks {count}{min(missing)}"
    if unknown:
        family = model.config.model_type
        return f"{what}, and holds {min(unknown)}, which transformers' {family} does not know; convert it to its names"
    return f"{what}; download it again"


def _name_of(model: Any, parameter: Tensor) -> str | None:
    return next((name for name, p in model.named_parameters() if p is parameter), None)


def _origins(model: Any, stored: Collection[str], key_mapping: dict[str, str]) -> tuple[dict[str, _Origin], list[str]]:
    """Return ({parameter or buffer of the model: what it is made of}, names in the files that nothing is made of).

    As transformers.core_model_loading.convert_and_load_state_dict_in_model does it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    expected, base = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model, key_mapping or None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, _Origin] = {}
    unknown = []
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, base, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], base, expected)
        if name not in expected:
            unknown.append(key)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        origin = found.setdefault(name, _Origin(name, converter))
        origin.sources.setdefault(pattern or key, []).append(key)
        if converter is not None:
            for target in converter.target_patterns[1:]:
                found[name.replace(converter.target_patterns[0], target)] = origin
    return found, unknown
