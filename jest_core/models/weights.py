"""Weights in files of jest and of other programs -> an open_clip model's state dictionary, or what does not fit."""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

State = Mapping[str, Tensor]

# Modules that wrap another one and put their own name before its names: torch.compile, DistributedDataParallel, FSDP1,
# and activation checkpointing
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SCALE = "logit_scale"  # a name that every model has, at the top


def parse(data: bytes, path: str) -> dict[str, Any]:
    """The content of a checkpoint file, as PyTorch or safetensors wrote it: tensors and plain values.

    Nothing in the file can run code. Raises ValueError, naming `path`, where it is damaged or something else.
    """
    if not data:
        raise ValueError(f"{path} is empty: copy or download it again")
    is_archive, is_pickle = data.startswith(b"PK"), data.startswith(b"\x80")
    if not (is_archive or is_pickle or data[8:9] == b"{"):
        raise ValueError(
            f"{path} starts with {data[:24]!r}, as neither PyTorch nor safetensors write files: name a checkpoint "
            "(a small file that names git-lfs stands for one that was not downloaded: `git lfs pull`)"
        )
    if is_archive and zipfile.is_zipfile(io.BytesIO(data)):
        _refuse_program(data, path)
    try:
        if not (is_archive or is_pickle):
            return dict(safetensors.load(data))
        checkpoint: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise _damaged(path, data, error) from error
        raise ValueError(
            f"{path} holds Python objects beside weights and plain values, and loading them could run code: save its "
            f"state_dict alone, by torch.save or as safetensors ({_reason(error)})"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # of many types: the bytes are in memory, so that each is about what they say
        if "allocate memory" in str(error):  # PyTorch has no type for it
            raise
        raise _damaged(path, data, error) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__} and no state dictionary: save model.state_dict()")
    return checkpoint


def _refuse_program(data: bytes, path: str) -> None:
    """Raises ValueError for a TorchScript archive, such as those that OpenAI published."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise ValueError(
                f"{path} is a TorchScript program and no state dictionary: OpenAI's are model.pretrained openai; "
                "of another save torch.jit.load(...).state_dict()"
            )


def _damaged(path: str, data: bytes, error: Exception) -> ValueError:
    return ValueError(
        f"{path}, {len(data):,} bytes, is cut off or damaged ({_reason(error)}): copy or download it again"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def fitted(checkpoint: Mapping[str, Any], wanted: State, model: str, source: str) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names of a model's state dictionary.

    They may be nested, and their names begin with those of modules that wrap a model. Raises ValueError where they are
    not exactly those of the model. model, source: names of the model and of the file, for the error.
    """
    state = _renamed(_state_of(checkpoint, source), wanted, source)
    if "text.positional_embedding" in wanted:
        from open_clip.model import convert_to_custom_text_state_dict  # here, as parsing a file does not need open_clip

        state = convert_to_custom_text_state_dict(state)
    for name in [name for name in state if name.endswith(".position_ids") and name not in wanted]:
        del state[name]  # a table of numbers that earlier releases of transformers saved
    for name, value in state.items():
        if name in wanted and value.numel() == wanted[name].numel() == 1:
            state[name] = value.reshape(wanted[name].shape)  # logit_scale, of shape () or (1,)
    if problem := _misfit(state, wanted):
        raise ValueError(f"the weights of {source} do not fit model {model}: {problem}")
    return state


def _state_of(checkpoint: Mapping[str, Any], source: str) -> State:
    """The only dictionary of a checkpoint with a logit_scale; of several the one under state_dict, as of open_clip."""
    found = dict(_dictionaries(checkpoint))
    main = [path for path in found if path in ("", "state_dict")]
    if not found:
        keys = ", ".join(map(str, list(checkpoint)[:6])) or "nothing"
        raise ValueError(
            f"{source} has no weights of a CLIP model, which have a {_SCALE}: it holds {keys}. Name the checkpoint of "
            "a whole model, with both towers"
        )
    if len(found) > 1 and not main:
        raise ValueError(
            f"{source} has weights under each of {', '.join(sorted(found))}: save the one that is meant as a file of "
            "its own"
        )
    return found[(main or list(found))[0]]


def _dictionaries(value: Mapping[Any, Any], path: str = "", depth: int = 3) -> Iterator[tuple[str, State]]:
    """Dictionaries of tensors with a logit_scale, by where they are in a checkpoint."""
    tensors = {name: x for name, x in value.items() if isinstance(name, str) and isinstance(x, Tensor)}
    if any(name.split(".")[-1] == _SCALE for name in tensors):
        yield path, tensors
    elif depth:
        for key, part in value.items():
            if isinstance(part, Mapping):
                yield from _dictionaries(part, f"{path}.{key}".lstrip("."), depth - 1)


def _renamed(state: State, wanted: State, source: str) -> dict[str, Tensor]:
    """Without the names of wrappers, and without what stands before logit_scale, such as `model.`."""

    def bare(name: str) -> str:
        return name if name in wanted else ".".join(word for word in name.split(".") if word not in _WRAPPERS)

    state = {bare(name): value for name, value in state.items()}
    prefixes = sorted(name.removesuffix(_SCALE) for name in state if name.split(".")[-1] == _SCALE)
    if "" in prefixes:
        return dict(state)
    if len(prefixes) > 1:
        raise ValueError(
            f"{source} has the weights of several models, {', '.join(p.rstrip('.') for p in prefixes)}: save the one "
            "that is meant as a file of its own"
        )
    return {name.removeprefix(prefixes[0]): x for name, x in state.items() if name.startswith(prefixes[0])}


def _misfit(state: State, wanted: State) -> str:
    """Which tensors differ, how, and what to do; nothing where all are there in their shapes."""
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if not (missing or extra or shapes):
        return ""
    if missing == ["logit_bias"] and not (extra or shapes):
        return (
            "they have no logit_bias, as models that were trained with a softmax loss: choose a model without "
            "init_logit_bias in its configuration, and as a learner training.loss softmax"
        )
    if extra == ["logit_bias"] and not (missing or shapes):
        return (
            "they have a logit_bias, as models that were trained with a sigmoid loss: choose a model with an "
            "init_logit_bias in its configuration, and as a learner training.loss sigmoid"
        )
    parts = [f"{len(missing)} of its tensors are missing there ({_some(missing)})"] if missing else []
    parts += [f"{len(extra)} there are unknown to it ({_some(extra)})"] if extra else []
    if shapes:
        pairs = [f"{name} {_shape(state[name])} there and {_shape(wanted[name])} here" for name in shapes]
        parts.append(f"{len(shapes)} have another shape ({_some(pairs)})")
    return "; ".join(parts) + f". {_remedy(state, wanted, shapes)}"


def _remedy(state: State, wanted: State, shapes: list[str]) -> str:
    lengths = [name for name in shapes if name in ("positional_embedding", "text.positional_embedding")]
    if shapes == lengths and lengths:
        return f"Set the model's context_length to {len(state[lengths[0]])}, with which they were trained"
    if shapes == ["visual.positional_embedding"] or shapes == ["visual.trunk.pos_embed"]:
        return "They were trained on pictures of another size: choose the model of that size"
    return "Set the model's name to that of the model whose weights they are"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "()"
