"""Flexible towers, compared with timm's resampling, with FlexiViT's least squares and with the unmodified towers."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmTower
from torch import nn

from jest_core import run_file
from jest_core.models import configurations, flexible, outlines, towers
from jest_core.models.flexible import Resolution, at, kernel_map, position_map
from jest_core.run_file import Model
from tests.conftest import RUN

# Class token, attention pooling, average pooling (of both libraries), rotary embeddings
STOCK = [
    "ViT-B-16",
    "ViT-B-16-SigLIP-256",
    "vit_medium_patch16_gap_256",
    "coca_ViT-B-32",
    "EVA02-B-16",
    "PE-Core-T-16-384",
]


def stock_tower(name: str) -> nn.Module:
    """The image tower of a stock model, as open_clip makes it, cut to one layer."""
    parts = {part: cfg for part, cfg in open_clip.get_model_config(name).items() if part.endswith("_cfg")}
    for cfg in parts.values():  # the text towers are not tested, and have most of the weights
        cfg |= {"layers": 1} | ({"vocab_size": 64} if "vocab_size" in cfg else {})
    with towers._warnings_off():
        visual = open_clip.create_model(name, load_weights=False, **parts).visual.eval()
    if hasattr(visual, "trunk"):  # a timm tower, whose configuration has no number of layers
        visual.trunk.blocks = visual.trunk.blocks[:1]
    return visual


def first(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out  # CoCa's tower returns its tokens too


def enlarge_patches(pixels: torch.Tensor, patch: int, other: int) -> torch.Tensor:
    """Each patch (`patch` pixels a side) resized separately and bilinearly to `other` pixels a side."""
    n, c, h, w = pixels.shape
    patches = pixels.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(-1, c, patch, patch)
    large = F.interpolate(patches, size=(other, other), mode="bilinear", align_corners=False, antialias=True)
    grid = large.reshape(n, h // patch, w // patch, c, other, other).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, c, h // patch * other, w // patch * other)


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_a_stock_tower_keeps_its_weights_and_works_at_every_resolution(name: str):
    visual = stock_tower(name)
    size = configurations.image_size(name)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain, weights = first(visual(pixels)), visual.state_dict()
    flexible.make_flexible(visual)
    patch = flexible.patch_size(visual)
    assert torch.equal(first(visual(pixels)), plain)
    with at(visual, Resolution(size, patch)):
        assert torch.equal(first(visual(pixels)), plain)

    # the same grid of larger patches: enlarging each patch and the kernel leaves the output unchanged
    with at(visual, Resolution(2 * size, 2 * patch)):
        torch.testing.assert_close(
            first(visual(enlarge_patches(pixels, patch, 2 * patch))), plain, rtol=1e-4, atol=1e-4
        )
    for other in (Resolution(size // 2 // patch * patch), Resolution(size // 2 // patch * patch, patch // 2)):
        small = F.interpolate(pixels, size=(other.image_size, other.image_size))
        with at(visual, other):
            out = first(visual(small))
        assert out.shape == plain.shape
        assert torch.isfinite(out).all()
    assert torch.equal(first(visual(pixels)), plain)  # and back at the first resolution
    assert {k: v.shape for k, v in visual.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def test_position_embeddings_of_another_grid_equal_timms_resampling():
    pair = towers.create("jest-tiny", seed=0)
    original = pair.model.visual.positional_embedding
    assert isinstance(original, nn.Parameter)
    with at(pair.model.visual, Resolution(64)):
        resized = pair.model.visual.positional_embedding
    torch.testing.assert_close(resized, resample_abs_pos_embed(original[None], [8, 8], [4, 4], num_prefix_tokens=1)[0])
    assert torch.equal(position_map(4, 4), torch.eye(16))


def test_a_smaller_kernel_is_the_least_squares_solution():
    """FlexiViT's PI-resize: over patches x of white noise, no kernel on the resized patch B x is closer to <x, w>."""
    eye = torch.eye(64, dtype=torch.float64).reshape(-1, 1, 8, 8)
    resize = (
        F.interpolate(eye, size=(4, 4), mode="bilinear", align_corners=False, antialias=True).flatten(1).T
    )  # (16, 64)
    kernel = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nearest = torch.linalg.lstsq(resize.T, kernel).solution
    torch.testing.assert_close(kernel @ kernel_map(8, 4).double(), nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-SigLIP-256"])
def test_gradients_flow_through_the_resized_kernel_and_positions(name: str):
    visual = stock_tower(name)
    flexible.make_flexible(visual)
    tower = getattr(visual, "trunk", visual)
    conv = tower.patch_embed.proj if hasattr(tower, "patch_embed") else tower.conv1
    size = configurations.image_size(name)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    if size % 32:
        pixels = pixels[:, :, : size // 32 * 32, : size // 32 * 32]
    with at(visual, Resolution(pixels.shape[-1], 32)):
        patches = conv(pixels)
        target = torch.randn(patches.shape, generator=torch.Generator().manual_seed(1))
        patches.backward(target)
        gradient = conv.weight.grad.clone()
        conv.weight.grad = None
        first(visual(pixels)).sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    positions = tower._parameters["pos_embed" if hasattr(tower, "patch_embed") else "positional_embedding"]
    assert positions.grad.abs().sum() > 0

    # chain rule: the gradient of a plain convolution by the kernel at 32, times the transposed map
    kernel = (conv.weight.detach().flatten(2) @ kernel_map(16, 32)).unflatten(2, (32, 32)).requires_grad_()
    F.conv2d(pixels, kernel, conv.bias, stride=32).backward(target)
    assert kernel.grad is not None
    torch.testing.assert_close(gradient, (kernel.grad.flatten(2) @ kernel_map(16, 32).T).unflatten(2, (16, 16)))


def test_a_tower_without_patches_is_not_changed():
    pair = towers.create("jest-drawings", seed=0)
    assert not flexible.is_flexible(pair.model.visual)
    assert pair.resolution() == Resolution(64)
    with at(pair.model.visual, Resolution(32, 8)):
        assert pair.model.visual(torch.zeros(1, 3, 48, 48)).shape == (1, 128)


@pytest.mark.parametrize(
    "tower",
    [
        lambda: TimmTower(img_size=30, patch_size=8, embed_dim=32, depth=1, num_heads=2),  # a margin of 6 pixels
        lambda: TimmTower(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, pos_embed="none"),
        lambda: TimmTower(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, dynamic_img_size=True),
        lambda: Eva(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, use_abs_pos_emb=False, use_rot_pos_emb=True
        ),
    ],
    ids=["margin", "no positions", "interpolates by itself", "rotary only"],
)
@torch.no_grad()
def test_unusual_timm_towers_keep_their_resolution_and_accept_others(tower):
    visual = tower().eval()
    size = visual.patch_embed.img_size[0]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain = visual(pixels)
    flexible.make_flexible(visual)
    for _ in range(2):
        assert torch.equal(visual(pixels), plain)
        with at(visual, Resolution(size, 8)):
            assert torch.equal(visual(pixels), plain)
        with at(visual, Resolution(16)):
            assert visual(torch.randn(2, 3, 16, 16)).shape == plain.shape
        with at(visual, Resolution(32, 16)):
            assert visual(torch.randn(2, 3, 32, 32)).shape == plain.shape


def test_unsupported_resolutions_are_refused_with_a_remedy():
    vit, convolutional = Model(name="jest-tiny"), Model(name="jest-drawings")
    towers.refuse_resolution(vit, "selection.score_", 16, None)
    towers.refuse_resolution(vit, "selection.score_", None, 16)
    towers.refuse_resolution(convolutional, "selection.score_", 32, None)
    with pytest.raises(ValueError, match=r"32 pixels do not divide into patches of 12: .*selection\.score_patch_size"):
        towers.refuse_resolution(vit, "selection.score_", None, 12)
    with pytest.raises(ValueError, match=r"selection\.score_image_size 64 is larger than the pictures of 32"):
        towers.refuse_resolution(vit, "selection.score_", 64, None)
    with pytest.raises(ValueError, match=r"jest-drawings has no patches.*give training\.low_resolution\.image_size"):
        towers.refuse_resolution(convolutional, "training.low_resolution.", None, 16)
    with pytest.raises(
        ValueError, match=r"swin.*takes pictures of 224 pixels and not of selection.score_image_size 112"
    ):
        towers.refuse_resolution(Model(name="swin_base_patch4_window7_224"), "selection.score_", 112, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.low_resolution={image_size: 32}"], r"training.low_resolution is that of jest-tiny itself"),
        (["selection.agreement_every_steps=2"], r"agreement_every_steps compares with .* is what this run does"),
        (["reference.score_patch_size=12"], r"change reference.score_image_size or reference.score_patch_size"),
    ],
)
def test_useless_resolution_settings_are_refused_before_anything_starts(overrides: list[str], message: str):
    run = run_file.load(RUN.format(root=".", name="x", shards="x"), overrides)
    with pytest.raises(ValueError, match=message):
        outlines.refuse_resolutions(run)
    if "reference" not in overrides[0]:
        outlines.refuse_resolutions(run_file.load(RUN.format(root=".", name="x", shards="x")))


@torch.no_grad()
def test_open_clip_loads_a_checkpoint_of_a_flexible_model(tmp_path):
    pair = towers.create("jest-tiny", seed=1)
    pixels, tokens = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), pair.tokens(["a", "b", "c"])
    low = pair.embed(pixels, tokens, batch_size=2, resolution=Resolution(32, 16))
    torch.save({"state_dict": pair.model.state_dict()}, tmp_path / "epoch_1.pt")
    plain = open_clip.create_model("jest-tiny", pretrained=str(tmp_path / "epoch_1.pt"), output_dict=True).eval()
    full = pair.embed(pixels, tokens, batch_size=2)
    normalised = 2 * pixels.float() / 255 - 1
    torch.testing.assert_close(plain.encode_image(normalised, normalize=True), full.image)
    assert not torch.allclose(low.image, full.image, atol=1e-2)
    assert torch.equal(low.text, full.text)
