"""Weights as other programs save them are read, or refused with what does not fit; nothing in a file runs."""

import io

import pytest
import torch
from safetensors.torch import save

from jest_core.models import towers, weights


@pytest.fixture(scope="module")
def ours() -> towers.Towers:
    return towers.create("jest-tiny", seed=1)


@pytest.fixture(scope="module")
def other() -> towers.Towers:
    return towers.create("jest-tiny", seed=2)


def saved(content: object) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink)
    return sink.getvalue()


def wrapped(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


NESTED = {
    "plain": lambda state: state,
    "module.": lambda state: {"state_dict": wrapped("module.", state), "epoch": 3},
    "_orig_mod.": lambda state: wrapped("_orig_mod.", state),
    "module._orig_mod.": lambda state: {"state_dict": wrapped("module._orig_mod.", state)},
    "_orig_mod.module.": lambda state: {"model": wrapped("_orig_mod.module.", state)},
    "fsdp": lambda state: wrapped("_fsdp_wrapped_module.", state),
    "compiled tower": lambda state: {k.replace("visual.", "visual._orig_mod."): v for k, v in state.items()},
    "lightning": lambda state: {"state_dict": {**wrapped("model.", state), "metric.total": torch.ones(2)}},
    "trainer": lambda state: {"trainer": {"net": wrapped("clip.", state)}, "optimizer": {"state": {0: {}}}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "open_clip with averages": lambda state: {
        "state_dict": state,
        "state_dict_ema": {k: torch.zeros_like(v) for k, v in state.items()},
    },
    "scale of one element": lambda state: state | {"logit_scale": state["logit_scale"][None]},
}


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED.keys())
def test_weights_are_found_under_the_names_of_wrappers_and_in_nested_dictionaries(nest, ours, other):
    content = nest(dict(ours.model.state_dict()))
    towers.load_weights(other, weights.parse(saved(content), "x.pt"))
    assert towers.weights_hash(other.model) == towers.weights_hash(ours.model)


def test_safetensors_and_the_older_pickles_are_read_whatever_the_name_of_the_file(ours, other):
    state = dict(ours.model.state_dict())
    older = io.BytesIO()
    torch.save(state, older, _use_new_zipfile_serialization=False)
    for data in (save(state), older.getvalue()):
        towers.load_weights(other, weights.parse(data, "x.bin"))
        assert towers.weights_hash(other.model) == towers.weights_hash(ours.model)


def test_names_of_text_towers_of_earlier_releases_are_read():
    pair, again = (towers.create("jest-drawings", seed=seed) for seed in (1, 2))
    old = {name.removeprefix("text."): value for name, value in pair.model.state_dict().items()}
    old["text.transformer.embeddings.position_ids"] = torch.arange(16)
    towers.load_weights(again, old)
    assert towers.weights_hash(again.model) == towers.weights_hash(pair.model)


def grown(state: dict[str, torch.Tensor], name: str, axis: int) -> dict[str, torch.Tensor]:
    return state | {name: torch.cat([state[name], state[name]], axis)}


MISFITS = {
    "tokens": (
        lambda s: grown(s, "positional_embedding", 0),
        r"1 have another shape \(positional_embedding 32x32 there and 16x32 here\)\. Set .* context_length to 32",
    ),
    "pictures": (lambda s: grown(s, "visual.positional_embedding", 0), "They were trained on pictures of another size"),
    "no bias": (lambda s: {k: v for k, v in s.items() if k != "logit_bias"}, "no logit_bias.* training.loss softmax"),
    "width": (
        lambda s: grown(grown(s, "text_projection", 1), "visual.proj", 1),
        r"2 have another shape .*Set the model's name to that of the model whose weights they are",
    ),
    "half": (lambda s: {k: v for k, v in s.items() if not k.startswith("visual")}, r"\d+ of its tensors are missing"),
    "more": (lambda s: s | {"text_decoder.x": torch.ones(1)}, r"1 there are unknown to it \(text_decoder\.x\)"),
    "tower": (lambda s: {k: v for k, v in s.items() if k.startswith("visual")}, "has no weights of a CLIP model"),
    "two models": (lambda s: wrapped("student.", s) | wrapped("teacher.", s), "several models, student, teacher"),
    "averages": (lambda s: {"model": s, "model_ema": s}, "weights under each of model, model_ema"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_of_another_model_are_refused_with_what_differs_and_a_remedy(change, message, ours, other):
    with pytest.raises(ValueError, match=rf"a\.pt.*{message}"):
        towers.load_weights(other, change(dict(ours.model.state_dict())), "a.pt")


def test_weights_with_a_bias_are_refused_by_a_model_without_one(ours):
    pair = towers.create("jest-tiny-softmax", seed=0)
    with pytest.raises(ValueError, match=r"a\.pt do not fit model jest-tiny-softmax: they have a logit_bias"):
        towers.load_weights(pair, ours.model.state_dict(), "a.pt")


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


class Program(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def program() -> bytes:
    sink = io.BytesIO()
    torch.jit.save(torch.jit.trace(Program(), torch.ones(1)), sink)
    return sink.getvalue()


def test_files_that_are_damaged_or_something_else_are_named(ours, capsys):
    state = dict(ours.model.state_dict())
    whole, tensors = saved(state), save(state)
    damaged = [whole[: len(whole) // 2], whole[:100], whole[:-50], tensors[: len(tensors) // 2], tensors[:40]]
    for data in damaged:
        with pytest.raises(ValueError, match=r"w/model\.bin, [\d,]+ bytes, is cut off or damaged"):
            weights.parse(data, "w/model.bin")
    others = {
        "is empty": b"",
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605\n",
        "as neither PyTorch nor safetensors": b"<!DOCTYPE html><html>Not found</html>",
        "could run code": saved({"state_dict": Evil()}),
        "holds a Tensor and no state dictionary": saved(torch.ones(3)),
        "TorchScript program": program(),
    }
    for message, data in others.items():
        with pytest.raises(ValueError, match=rf"w/model\.bin.*{message}"):
            weights.parse(data, "w/model.bin")
    assert "ran" not in capsys.readouterr().out
