"""Flexible towers against timm's own resampling, FlexiViT's promise, and the plain towers that they were."""

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
    for cfg in parts.values():  # the text towers are not looked at, and most of the weights to draw
        cfg |= {"layers": 1} | ({"vocab_size": 64} if "vocab_size" in cfg else {})
    with towers._warnings_off():
        visual = open_clip.create_model(name, load_weights=False, **parts).visual.eval()
    if hasattr(visual, "trunk"):  # timm's, whose configurations have no number of layers
        visual.trunk.blocks = visual.trunk.blocks[:1]
    return visual


def first(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out  # CoCa's tower gives its tokens too


def enlarge_patches(pixels: torch.Tensor, own: int, other: int) -> torch.Tensor:
    """Every patch of `own` pixels a side resized to `other` by itself, bilinearly."""
    n, c, h, w = pixels.shape
    patches = pixels.reshape(n, c, h // own, own, w // own, own).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, own, own)
    large = F.interpolate(patches, size=(other, other), mode="bilinear", align_corners=False, antialias=True)
    grid = large.reshape(n, h // own, w // own, c, other, other).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, c, h // own * other, w // own * other)


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_a_stock_tower_keeps_its_weights_and_works_at_every_resolution(name: str):
    visual = stock_tower(name)
    size = configurations.image_size(name)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain, weights = first(visual(pixels)), visual.state_dict()
    flexible.make_flexible(visual)
    own = flexible.patch_size(visual)
    assert torch.equal(first(visual(pixels)), plain)
    with at(visual, Resolution(size, own)):
        assert torch.equal(first(visual(pixels)), plain)

    # the same grid of larger patches: what was seen at 16 on a picture is seen at 32 on its patches enlarged
    with at(visual, Resolution(2 * size, 2 * own)):
        torch.testing.assert_close(first(visual(enlarge_patches(pixels, own, 2 * own))), plain, rtol=1e-4, atol=1e-4)
    for other in (Resolution(size // 2 // own * own), Resolution(size // 2 // own * own, own // 2)):
        small = F.interpolate(pixels, size=(other.image_size, other.image_size))
        with at(visual, other):
            out = first(visual(small))
        assert out.shape == plain.shape
        assert torch.isfinite(out).all()
    assert torch.equal(first(visual(pixels)), plain)  # and back
    assert {k: v.shape for k, v in visual.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def test_another_grid_has_the_position_embeddings_that_timm_gives_it():
    pair = towers.create("jest-tiny", seed=0)
    own = pair.model.visual.positional_embedding
    assert isinstance(own, nn.Parameter)
    with at(pair.model.visual, Resolution(64)):
        resized = pair.model.visual.positional_embedding
    torch.testing.assert_close(resized, resample_abs_pos_embed(own[None], [8, 8], [4, 4], num_prefix_tokens=1)[0])
    assert torch.equal(position_map(4, 4), torch.eye(16))


def test_a_smaller_kernel_is_the_nearest_in_least_squares():
    """Over patches x of white noise, no kernel comes nearer to <x, w> on B x than PI-resize's."""
    eye = torch.eye(64, dtype=torch.float64).reshape(-1, 1, 8, 8)
    resize = (
        F.interpolate(eye, size=(4, 4), mode="bilinear", align_corners=False, antialias=True).flatten(1).T
    )  # (16, 64)
    kernel = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nearest = torch.linalg.lstsq(resize.T, kernel).solution
    torch.testing.assert_close(kernel @ kernel_map(8, 4).double(), nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-SigLIP-256"])
def test_gradients_go_through_the_resized_kernel_and_positions(name: str):
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
        found = conv.weight.grad.clone()
        conv.weight.grad = None
        first(visual(pixels)).sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    positions = tower._parameters["pos_embed" if hasattr(tower, "patch_embed") else "positional_embedding"]
    assert positions.grad.abs().sum() > 0

    # by hand: d<kernel at 32, x> = map times the gradient of a plain convolution
    kernel = (conv.weight.detach().flatten(2) @ kernel_map(16, 32)).unflatten(2, (32, 32)).requires_grad_()
    F.conv2d(pixels, kernel, conv.bias, stride=32).backward(target)
    assert kernel.grad is not None
    torch.testing.assert_close(found, (kernel.grad.flatten(2) @ kernel_map(16, 32).T).unflatten(2, (16, 16)))


def test_a_tower_without_patches_stays_as_it_is():
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
def test_less_usual_towers_keep_their_own_resolution_and_gain_others(tower):
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


def test_what_a_tower_cannot_do_is_refused_with_a_remedy():
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
def test_settings_that_do_nothing_are_refused_before_anything_starts(overrides: list[str], message: str):
    run = run_file.load(RUN.format(root=".", name="x", shards="x"), overrides)
    with pytest.raises(ValueError, match=message):
        outlines.refuse_resolutions(run)
    if "reference" not in overrides[0]:
        outlines.refuse_resolutions(run_file.load(RUN.format(root=".", name="x", shards="x")))


@torch.no_grad()
def test_a_checkpoint_of_a_flexible_model_is_a_plain_one(tmp_path):
    pair = towers.create("jest-tiny", seed=1)
    pixels, tokens = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), pair.tokens(["a", "b", "c"])
    low = pair.embed(pixels, tokens, batch_size=2, resolution=Resolution(32, 16))
    torch.save({"state_dict": pair.model.state_dict()}, tmp_path / "epoch_1.pt")
    plain = open_clip.create_model("jest-tiny", pretrained=str(tmp_path / "epoch_1.pt"), output_dict=True).eval()
    own = pair.embed(pixels, tokens, batch_size=2)
    shown = 2 * pixels.float() / 255 - 1
    torch.testing.assert_close(plain.encode_image(shown, normalize=True), own.image)
    assert not torch.allclose(low.image, own.image, atol=1e-2)
    assert torch.equal(low.text, own.text)
