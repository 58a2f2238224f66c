"""FLOP counts, compared with torch's counter on real steps, with a ViT's formula, and with the paper's figures."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jest_core import flops, run_file
from jest_core.run_file import Model
from jest_core.training.step import train_step
from tests.conftest import RUN
from tests.core.training.test_step import make_learner, super_batch


class Counter(FlopCounterMode):
    """torch's counter, which alone would leave out in-place addmm_ and attention that is fused on the CPU."""

    def __init__(self) -> None:
        def in_place(_, a, b, **kwargs):
            return 2 * a[0] * a[1] * b[1]

        super().__init__(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
        self.plain_attention = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self):
        self.plain_attention.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.plain_attention.__exit__(*args)


@pytest.mark.parametrize(
    ("ratio", "reused", "not_reused", "online"),
    [(0.5, 1.33, 1.67, 2.00), (0.8, 2.33, 2.67, 4.00), (0.9, 4.00, 4.33, 7.33)],
)
def test_the_papers_table_of_cost_ratios(ratio: float, reused: float, not_reused: float, online: float):
    """The paper's costs relative to uniform training; `online` has an online reference and reuses the scoring pass."""
    forward, b = 1e9, 32768
    sizes = {"forward": forward, "sub_batch_size": b, "super_batch_size": round(b / (1 - ratio)), "n_chunks": 16}
    cached = flops.training_flops(**sizes)
    uniform = flops.training_flops(**(sizes | {"super_batch_size": b})).total
    assert cached.total / uniform == pytest.approx(not_reused, abs=0.01)
    assert cached.total_with_reuse / uniform == pytest.approx(reused, abs=0.01)
    with_reference = flops.training_flops(**sizes, reference_forward=forward)
    assert with_reference.total_with_reuse / uniform == pytest.approx(online, abs=0.01)


def test_the_papers_figures_of_flexijest():
    """Patch 32 costs 72 % less than patch 16, a half-and-half sub-batch 64 % of a whole one, a step 1.1 uniform ones.

    To within a point or two: layers alone give 71.7 %; embedding of patches and pooling, counted here, make it 71.3 %.
    """
    model = Model(name="ViT-B-16-SigLIP-256", context_length=16)
    full, low = flops.forward_flops(model).total, flops.forward_flops(model, None, 32).total
    assert 1 - low / full == pytest.approx(0.72, abs=0.01)
    assert (full + low) / 2 / full == pytest.approx(0.64, abs=0.005)
    b = 32768
    step = flops.training_flops(
        forward=full,
        score_forward=low,
        low_forward=low,
        n_low_resolution=b // 2,
        sub_batch_size=b,
        super_batch_size=5 * b,
        n_chunks=16,
        widths=(768, 768),
        loss_width=768,
        n_parameters=flops.n_parameters(model),
    )
    uniform = flops.training_flops(
        forward=full, sub_batch_size=b, super_batch_size=b, n_chunks=16, loss_width=768, n_parameters=2 * 10**8
    )
    assert (step.score + step.train) / uniform.train == pytest.approx(1.10, abs=0.025)
    assert (step.select + step.loss + step.optimizer) / step.total < 0.01  # so that only forward passes matter


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("jest-drawings", []),
        ("jest-drawings", ["selection.score_image_size=32", "training.low_resolution={image_size: 32}"]),
        ("jest-drawings", ["selection.score_image_size=32", "selection.agreement_every_steps=1"]),
        ("jest-drawings", ["selection.method=uniform", "training.micro_batch_size=8"]),
        ("jest-drawings", ["selection.method=independent"]),
        ("jest-drawings", ["selection.criterion=easy"]),
        ("jest-tiny", ["selection.method=uniform"]),
        ("jest-tiny", ["selection.method=uniform", "training.low_resolution={patch_size: 16, share: 0.25}"]),
    ],
)
def test_step_flops_match_torchs_counter(name: str, overrides: list[str]):
    learner = make_learner([f"model.name={name}", "reference.model.name=jest-tiny", *overrides], name=name)
    step, run = flops.step_flops(learner.run), learner.run
    batch = super_batch(learner.towers)
    if not run.selection.selects:
        batch = batch[torch.arange(run.sub_batch_size)]
    batch = dataclasses.replace(batch, reference_image=batch.reference_text)
    train_step(learner, batch, 0)  # the first step computes the resizing maps of a resolution
    with Counter() as counter:
        train_step(learner, batch, 1)
    # torch does not count the optimiser, and no gradient of the pixels is computed: a third of the first layer's part
    pixel_gradients = sum(
        n * first_layer(name, size)
        for n, size in (
            (run.sub_batch_size - run.n_low_resolution, learner.towers.view.image_size),
            (run.n_low_resolution, learner.low_resolution.image_size),
        )
    )
    # the kernel and the positions are resized once a pass, forward and backward, whatever the number of examples
    resizing = 2 * 2 * (32 * 3 * 64 * 256 + 4 * 16 * 32) if learner.low_resolution.patch_size == 16 else 0
    expected = step.total - step.optimizer - pixel_gradients + resizing
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def first_layer(name: str, image_size: int) -> int:
    """FLOPs of the first convolution on one picture: 7 x 7 with stride 2, or patches of any size."""
    return 2 * 3 * image_size**2 * {"jest-drawings": 49 * 32 // 4, "jest-tiny": 32}[name]


def test_selection_flops_are_those_of_its_matrix_products():
    from tests.core.selection.draws import model, pick

    learner, reference = model(128, 8, 0), model(128, 6, 1)
    step = flops.training_flops(forward=1.0, sub_batch_size=32, super_batch_size=128, n_chunks=4, widths=(8, 6))
    with Counter() as counter:
        pick(learner, reference, 32, n_chunks=4)
    assert counter.get_total_flops() == step.select


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_loss_flops_are_those_of_its_matrix_products(loss: str):
    from jest_core.losses import sigmoid_loss, softmax_loss

    image, text = (torch.randn(16, 8, requires_grad=True) for _ in range(2))
    step = flops.training_flops(
        forward=0.0, sub_batch_size=16, super_batch_size=16, n_chunks=1, loss=loss, loss_width=8
    )
    with Counter() as counter:
        if loss == "sigmoid":
            sigmoid_loss(image, text, torch.tensor(10.0), torch.tensor(-10.0), tile=8).backward()
        else:
            softmax_loss(image, text, torch.tensor(10.0), tile=8).backward()
    assert counter.get_total_flops() == step.loss


def test_a_run_file_decides_the_cost():
    def step(*overrides: str) -> flops.StepFlops:
        return flops.step_flops(run_file.load(RUN.format(root=".", name="x", shards="x"), list(overrides)))

    cached, online = step(), step("reference.online=true")
    assert cached.reference == 0.0
    assert online.reference == cached.score
    assert step("training.micro_batch_size=4").train == pytest.approx(4 / 3 * cached.train)
    assert step("selection.score_patch_size=16").reusable == 0.0
    flexi = step("selection.score_patch_size=16", "training.low_resolution={patch_size: 16}")
    assert flexi.train < cached.train
    assert flexi.reusable == pytest.approx(flexi.score / 4)  # half of b, which is half of B
    compared = step("selection.score_patch_size=16", "selection.agreement_every_steps=10")
    assert compared.agreement == pytest.approx((cached.score + cached.select) / 10)
