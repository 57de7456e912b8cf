"""Models in folders: config.json and a file of weights as Hugging Face lays them out, strict about every name."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import MultiheadAttention
from .names import Rule as Rule
from .names import within

_Model = TypeVar("_Model", bound="Pretrained")

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"

# What a config.json may say without changing what a model computes: where it comes from, how it was trained, what
# its tokenizer and its labels are called, how the other library runs it and what its generate() does by default.
_OF_NO_CONCERN = frozenset(
    """
    _name_or_path _attn_implementation architectures bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905  (a list would be fifty lines)
)


class Pretrained(torch.nn.Module):
    """A model that is read from a folder and written to one, in the layout of Hugging Face's transformers.

    The folder has ``config.json`` and ``model.safetensors`` (which takes the package safetensors) or
    ``pytorch_model.bin``. Nothing is downloaded. A subclass is constructed from its configuration and states:

    - ``Config``: a dataclass whose fields have config.json's names.
    - ``model_type``, ``architecture``: config.json's names for the family and for this very model.
    - ``names``: the rules between its names and the file's, the first that fits counts; without one the names are
      the same.
    - ``prefix``: what the names of a model without a head begin with inside one with a head, ``"bert."``; files of
      either kind are then read by models of either kind.
    - ``tied``: theirs that are copies, by the name of what they copy; compared when read, and not written.
    - ``ignored``: theirs that carry nothing, as names that may have ``{}``.
    - ``spelled``: old endings of theirs, by the present ones.
    - ``fixed``: what config.json may say only so, as it also means by its silence: the rest is not implemented.
    - ``unused``: keys of config.json, beyond those of every model, that do not matter here.

    Example:
        >>> import tempfile
        >>> from fastseq.models import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BertModel(config).save_pretrained(folder)
        ...     model = BertModel.from_pretrained(folder)
        >>> model.config == config
        True
    """

    Config: type[Any]
    model_type: str
    architecture: str
    names: tuple[Rule, ...] = ()
    prefix: str = ""
    tied: ClassVar[dict[str, str]] = {}
    ignored: tuple[str, ...] = ()
    spelled: ClassVar[dict[str, str]] = {}
    fixed: ClassVar[dict[str, Any]] = {
        "add_cross_attention": False,
        "cross_attention_hidden_size": None,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "pruned_heads": {},
        "quantization_config": None,
        "tie_encoder_decoder": False,
    }
    unused: frozenset[str] = frozenset()

    config: Any

    def __init__(self, config: Any, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        folder: str | os.PathLike[str],
        *,
        device: Any = None,
        dtype: Any = None,
        fresh: Sequence[str] = (),
        unread: Sequence[str] = (),
        **overrides: Any,
    ) -> _Model:
        """The model of a folder, in evaluation mode.

        Args:
            folder: with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.
            device, dtype: of the parameters, as for any module of torch: the file's dtype does not matter.
            fresh: parts of ours that the file lacks and that stay as initialised, such as a new ``"classifier"``.
            unread: parts of the file that are left out, such as the head ``"cls"`` of another task.
            overrides: fields of the configuration, in place of what config.json says.

        Raises:
            FileNotFoundError: the folder has no configuration, or no weights.
            ValueError: the configuration says what is not implemented or not known; the file's names or shapes are
                not those of the model; a copy differs from what it copies.
            ImportError: ``model.safetensors`` without the package safetensors.
        """
        place = Path(folder)
        model = cls(cls._read_config(place, overrides), device=device, dtype=dtype)
        model._take(_read_weights(place), fresh, unread)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, safetensors: bool = True) -> None:
        """Write the configuration and the weights, ``pytorch_model.bin`` if not ``safetensors``.

        Raises:
            ImportError: the package safetensors is not installed.
        """
        place = Path(folder)
        weights: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            rule, theirs = self._rule(name)
            weights.update(zip(theirs, rule.write(tensor, len(theirs), self.config), strict=True))
        said = {"model_type": self.model_type, "architectures": [self.architecture]}
        said |= dataclasses.asdict(self.config)
        place.mkdir(parents=True, exist_ok=True)
        if safetensors:
            _safetensors().save_file(weights, place / _SAFE, metadata={"format": "pt"})
        else:
            torch.save(weights, place / _PICKLED)
        (place / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")

    def _initialise(self, std: float) -> None:
        """BERT's and GPT-2's way: normal weights, zero biases and norms that change nothing."""
        for module in self.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=std)
            elif isinstance(module, MultiheadAttention):
                torch.nn.init.normal_(module.in_proj_weight, std=std)
                torch.nn.init.zeros_(module.in_proj_bias)
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()

    @classmethod
    def _read_config(cls, folder: Path, overrides: Mapping[str, Any]) -> Any:
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"folder: expected one with config.json, got {str(folder)!r}; none is downloaded")
        said = json.loads(file.read_text())
        if said.get("model_type") != cls.model_type:
            raise ValueError(f"config.json, model_type: expected {cls.model_type!r}, got {said.get('model_type')!r}")
        fields = {field.name for field in dataclasses.fields(cls.Config) if field.init}
        for key, value in said.items():
            if key in cls.fixed and value != cls.fixed[key]:
                raise ValueError(f"config.json, {key}: expected {cls.fixed[key]!r}, all there is here, got {value!r}")
            if key not in fields and key not in cls.fixed and key not in _OF_NO_CONCERN | cls.unused:
                raise ValueError(f"config.json, {key}: expected a key of {cls.Config.__name__}, got {value!r}")
        return cls.Config(**{key: value for key, value in said.items() if key in fields} | dict(overrides))

    @classmethod
    def _rule(cls, name: str) -> tuple[Rule, list[str]]:
        """The rule for one of our names, and theirs that it makes of it."""
        for rule in cls.names:
            theirs = rule.named(name)
            if theirs is not None:
                return rule, theirs
        return Rule(name, name), [name]

    def _take(self, weights: Mapping[str, Tensor], fresh: Sequence[str], unread: Sequence[str]) -> None:
        """The weights of a file, every one of which must have its place, and every place its weight."""
        own = {name: tensor for name, tensor in self.state_dict().items() if not within(fresh, name)}
        rules = {name: self._rule(name) for name in own}
        wanted = {theirs for _, each in rules.values() for theirs in each}
        found = self._adapted(weights, wanted)
        missing = sorted(wanted - found.keys())
        passed = (*unread, *self.ignored)
        unexpected = sorted(name for name in found.keys() - wanted if not within(passed, name))
        if missing or unexpected:
            raise ValueError(
                f"weights: missing {_listed(missing)}; unexpected {_listed(unexpected)} "
                "(fresh= names parts of ours that may be missing, unread= parts of the file that may be left out)"
            )
        for name, tensor in own.items():
            rule, theirs = rules[name]
            parts = [found[each] for each in theirs]
            made = rule.read(parts) if len({part.shape for part in parts}) == 1 else None
            if made is None or made.shape != tensor.shape:
                shapes = ", ".join(f"{each} {list(part.shape)}" for each, part in zip(theirs, parts, strict=True))
                raise ValueError(f"weights: expected {name} {list(tensor.shape)}, got {shapes}")
            tensor.copy_(made)  # shares its memory with the parameter

    def _adapted(self, weights: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
        """The weights by the names they would have in a file that this very model had written."""
        found: dict[str, Tensor] = {}
        inside, held = (any(name.startswith(self.prefix) for name in names) for names in (wanted, weights))
        for name, tensor in weights.items():
            if inside and not held:
                name = self.prefix + name
            elif held and not inside:
                name = name.removeprefix(self.prefix)
            for old, new in self.spelled.items():
                if name.endswith(old):
                    name = name.removesuffix(old) + new
            found[name] = tensor
        for copy, original in self.tied.items():
            if copy in found and copy not in wanted:
                tensor = found.pop(copy)
                if not torch.equal(found.setdefault(original, tensor), tensor):
                    raise ValueError(f"weights: expected {copy} to be {original}, to which it is tied, got another")
        return found


def activation(key: str, name: str) -> Callable[[Tensor], Tensor]:
    """The function that the configuration's ``key`` names.

    Raises:
        ValueError: there is none of that name.

    Example:
        >>> import torch
        >>> from fastseq.models.pretrained import activation
        >>> activation("hidden_act", "relu")(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"{key}: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _gelu_by_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_by_tanh,
    "gelu_pytorch_tanh": _gelu_by_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def _listed(names: list[str]) -> str:
    most = 6
    return f"[{', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}]"


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ImportError as missing:
        raise ImportError(f"{_SAFE}: needs safetensors (pip install safetensors), or {_PICKLED}") from missing
    return safetensors


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / _SAFE).is_file():
        return _safetensors().load_file(folder / _SAFE)  # type: ignore[no-any-return]
    if (folder / _PICKLED).is_file():
        return torch.load(folder / _PICKLED, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    found = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(f"folder: expected {_SAFE} or {_PICKLED}, each in one piece, got {found}")
