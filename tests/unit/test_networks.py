"""Networks: sizes, shapes, gradients, their special parts, pretrained encoders, and a way through inference each."""

from __future__ import annotations

import errno
import json
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.stores.grid import Grid
from pipeline.stores.maps import MapStore
from pipeline.testing import write_package, write_tiles

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torchvision.models import resnet34, squeezenet1_0  # noqa: E402

from pipeline.models.weights import load_network, load_weights, weights_for  # noqa: E402
from pipeline.networks import blocks  # noqa: E402
from pipeline.networks.blocks import ImageNetNormalise, PositionTable, SelfAttention  # noqa: E402
from pipeline.networks.cenet import DenseAtrousConvolution, ResidualMultiPooling  # noqa: E402
from pipeline.networks.command import count_multiply_adds  # noqa: E402
from pipeline.networks.encoders import ResNet34Encoder, load_encoder, read_state  # noqa: E402
from pipeline.networks.mtl import AttentionGate, MultiDilatedBlock  # noqa: E402
from pipeline.networks.outputs import Folding, Outputs  # noqa: E402
from pipeline.networks.registry import NETWORKS, build_network, head_channels, stride_of  # noqa: E402
from pipeline.networks.squeeze import SqueezeEncoder  # noqa: E402
from pipeline.training.predict import predict_field  # noqa: E402

NARROW = {"widths": [4, 6, 8, 8, 12]}
TRANSFORMER = {"width": 16, "depth": 1, "heads": 2, "image": 64}
TIMM = {"encoder": "efficientnet-b0", "decoder_channels": [32, 16, 8, 8, 4]}
MASK = {"backbone": "resnet18", "channels": 8, "hidden": 8, "convolutions": 1, "proposals": 50, "score": 0.0}
SMALL: dict[str, dict[str, Any]] = {
    "resunet": {"widths": [4, 6, 8]},
    "unet": NARROW,
    "resunet-full": NARROW,
    "linknet34": {},
    "unet-vit": NARROW | {"depth": 1, "heads": 2, "hidden": 16, "image": 64},
    "cenet": {},
    "mtl": NARROW | TRANSFORMER,
    "mtl-base": NARROW | TRANSFORMER,
    "unetplusplus-b3": TIMM,
    "unetplusplus-b4": TIMM,
    "unetplusplus-b5": TIMM,
    "smp-unet": {"encoder": "resnet18", "decoder_channels": [16, 8, 8, 8, 4]},
    "squeeze-unet": {"widths": [4, 6, 8, 8, 12]},
    "hovernet-se": {"layers": [1, 1, 1, 1]},
    "hovernet-se-101": {"layers": [1, 1, 1, 1]},
    "pix2pix": NARROW,
    "maskrcnn": MASK,
    "maskrcnn-small": MASK,
}
"""Arguments that make each network small."""

FAMILIES = sorted(set(SMALL) - {"mtl-base", "unetplusplus-b4", "unetplusplus-b5", "hovernet-se-101", "maskrcnn"})
"""Names whose small networks differ."""


def mixed_up(network: nn.Module) -> nn.Module:
    """A network whose normalisations have something to do."""
    torch.manual_seed(1)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight, part.bias, part.running_mean):
                nn.init.normal_(values, 0.5, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "args"),
    [("resunet", {"widths": [4, 6, 8], "blocks": [1, 2, 2], "fold": 2}), ("squeeze-unet", SMALL["squeeze-unet"])],
)
def test_folded_normalisations_change_no_map(name: str, args: dict[str, Any]) -> None:
    network = mixed_up(build_network(name, 2, args))
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network(x)
        assert isinstance(network, Folding)
        network.fold_norms()
        np.testing.assert_allclose(network(x), expected, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_generator_of_pix2pix() -> None:
    network = on_meta("pix2pix", 3)
    assert parameters(network) == 54_413_955
    assert sum(isinstance(part, nn.Dropout) for part in network.modules()) == 3
    layers = [part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [(part.kernel_size, part.stride) for part in layers] == [((4, 4), (2, 2))] * 16
    small = build_network("pix2pix", 1, NARROW | {"dropout": 0.0})
    for x in (torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 32, 32)):  # down to a pixel, and one image a step
        small.train()(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters())
    with pytest.raises(PipelineError, match=r"network 'pix2pix': widths \[8\]: use two levels or more"):
        build_network("pix2pix", 1, {"widths": [8]})


def on_meta(name: str, channels: int = 1, **args: Any) -> nn.Module:
    with torch.device("meta"):
        return build_network(name, channels, args)


def test_every_network_is_tested() -> None:
    assert set(SMALL) == set(NETWORKS)


@pytest.mark.parametrize(
    ("name", "count"),
    [("unet", 31_031_745), ("resunet-full", 32_439_175), ("linknet34", 22_202_481)],
)
def test_published_sizes(name: str, count: int) -> None:
    assert parameters(on_meta(name)) == count


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("mtl", 9e6, 12e6),
        ("mtl-base", 35e6, 45e6),
        ("hovernet-se", 31.5e6, 31.7e6),
        ("hovernet-se-101", 52.5e6, 53.5e6),
    ],
)
def test_sizes(name: str, least: float, most: float) -> None:
    assert least < parameters(on_meta(name)) < most


def test_batch_normalisation_of_the_unet_is_a_choice() -> None:
    def norms(norm: bool) -> int:
        return sum(isinstance(m, nn.BatchNorm2d) for m in on_meta("unet", norm=norm).modules())

    assert (norms(False), norms(True)) == (0, 18)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not NETWORKS[name].instances])
def test_shapes_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 3, SMALL[name])
    for module in network.modules():  # some residual branches begin at zero, which would hide what is before them
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    if name.startswith("unetplusplus"):
        network.encoder._drop_connect_rate = 0.0
    stride = NETWORKS[name].stride
    logits = network(torch.rand(2, 3, 2 * stride, 3 * stride))
    assert logits.shape == (2, 3, 2 * stride, 3 * stride)
    logits.square().mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        if parameter.ndim > 1:
            assert parameter.grad.any(), key
    network.eval()
    with torch.inference_mode():
        for height, width in ((stride, 4 * stride), (96, 32)):
            assert network(torch.rand(1, 3, height, width)).shape == (1, 3, height, width)


@pytest.mark.parametrize("form", [{"stride": 1}, {"stem": False}])
def test_squeeze_unet_without_a_stem(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = build_network("squeeze-unet", 2, {"widths": [4, 6, 8, 8], **form}).eval()
    logits = network(torch.rand(1, 3, 32, 48))
    assert logits.shape == (1, 2, 32, 48)
    if not form.get("stem", True):  # the pixels of a square differ
        assert (logits[..., ::2] - logits[..., 1::2]).abs().max() > 0
    logits.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("more", "fold"), [({}, 2), ({"widths": [6, 6, 12], "blocks": [1, 2, 3]}, 1),
                                            ({"widths": [4, 8, 8], "blocks": [2, 1, 2]}, 2)])  # fmt: skip
def test_a_grown_network_computes_the_same(more: dict[str, Any], fold: int) -> None:
    torch.manual_seed(0)
    small = build_network("resunet", 2, SMALL["resunet"])
    for layer in small.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 2)
    large = build_network("resunet", 2, SMALL["resunet"] | more | {"fold": fold})
    load_weights(large, small.state_dict(), grow=True)
    small.eval(), large.eval()
    x = torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        expected = small(nn.functional.avg_pool2d(x, fold))
        torch.testing.assert_close(large(x), nn.functional.interpolate(expected, scale_factor=fold))
    x.requires_grad_()
    large.train()(x).square().mean().backward()
    added = [p for name, p in large.named_parameters() if name.startswith("deeper")]
    assert all(p.grad is not None for p in added)


@pytest.mark.parametrize(("network", "args"), [("resunet", {}), ("resunet", {"fold": 2}), ("squeeze-unet", {}),
                                               ("hovernet-se", {}), ("mtl", {}), ("pix2pix", {})])  # fmt: skip
def test_maps_keep_their_weights_among_other_heads(tmp_path: Path, network: str, args: dict[str, Any]) -> None:
    args = SMALL[network] | args
    package = write_package(tmp_path / "model", network, args, heads=("nucleus", "contour", "distance"))
    names = ("nucleus", "distance", "type:background", "type:Tumour")
    other = build_network(network, len(names), args, pretrained=False).eval()
    load_weights(other, weights_for(package, names), grow=True)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected, found = load_network(package)(x), other(x)
    torch.testing.assert_close(found[:, 0], expected[:, 0])
    torch.testing.assert_close(found[:, 1], expected[:, 2])
    assert (found[:, 2:] - expected[:, 1:2]).abs().amin() > 0


def test_networks_that_cannot_grow() -> None:
    large = build_network("resunet", 2, {"widths": [4, 6, 8]})
    for small in ({"widths": [4, 6, 9]}, {"widths": [4, 6, 8, 8]}, {"widths": [4, 6, 8], "fold": 2}):
        with pytest.raises(PipelineError, match="the weights belong to another network"):
            load_weights(large, build_network("resunet", 2, small).state_dict(), grow=True)
    for lost in ("stem.0.weight", "head.3.bias"):
        state = {name: weight for name, weight in large.state_dict().items() if name != lost}
        with pytest.raises(PipelineError, match=f"another network: {lost} is missing"):
            load_weights(large, state, grow=True)
    with pytest.raises(PipelineError, match="blocks has 2 levels, widths has 3"):
        build_network("resunet", 2, {"widths": [4, 6, 8], "blocks": [1, 1]})


def test_folded_patches_are_of_a_larger_stride() -> None:
    assert stride_of("resunet", {"fold": 2}) == 2 * stride_of("resunet", {})


@pytest.mark.parametrize("name", [name for name in FAMILIES if "maskrcnn" not in name])
def test_strides_are_the_least_that_fit(name: str) -> None:
    """Sides of the stride pass; where it is told by ``widths``, half of it does not."""
    args = SMALL[name]
    if NETWORKS[name].levels:
        args = args | {"widths": [4, 6, 6, 6, 8, 8]}
    stride = stride_of(name, args)
    network = build_network(name, 1, args, pretrained=False).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 3 * stride, 3 * stride)).shape[2:] == (3 * stride, 3 * stride)
        if NETWORKS[name].levels:
            assert stride == (64 if NETWORKS[name].halved else 32)
            with pytest.raises(RuntimeError):
                network(torch.rand(1, 3, 3 * stride // 2, 3 * stride // 2))


@pytest.mark.parametrize("args", [{"widths": [4, 4, 4, 4, 4], "fold": 4}, {"widths": [4, 4, 4], "fold": 3}])
def test_fields_are_padded_to_the_networks_stride(args: dict[str, Any]) -> None:
    network = build_network("resunet", 2, args)
    maps = predict_field(network, np.zeros((150, 70, 3), np.uint8), Outputs(("nucleus", "distance")))
    assert maps.shape == (2, 150, 70)


def infer(folder: Path, model: Path, batch: int = 2) -> np.ndarray:
    """Maps of a small slide of tiles, made by the command."""
    write_tiles(folder / "tiles.zarr", Grid(192, 192, 0.5, 2.0, 2.0))
    ok = {"status": "ok", "failure": None}
    (folder / "tiles.json").write_text(json.dumps({"stage": "tiles", **ok}))
    (folder / "stain.json").write_text(json.dumps({"stage": "stain", **ok, "transform": {"method": "none"}}))
    options = {
        "slide": "s",
        "tiles": folder / "tiles.json",
        "zarr": folder / "tiles.zarr",
        "stain": folder / "stain.json",
        "model": model,
        "device": "cpu",
        "batch": batch,
        "threads": 1,
        "out": folder / "maps.json",
        "zarr-out": folder / "maps.zarr",
    }
    assert main(["infer", *(f"--{key}={value}" for key, value in options.items())]) == 0
    return MapStore.open(folder / "maps.zarr").read(0, 0, 192, 192)


@pytest.mark.parametrize("name", FAMILIES)
def test_infer_takes_a_package_of_every_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_fetching(monkeypatch)
    args = SMALL[name] | ({"encoder_weights": "imagenet"} if NETWORKS[name].pretrained else {})
    package = write_package(tmp_path / "model", name, args, heads=NETWORKS[name].heads)
    maps = infer(tmp_path, package.folder)
    assert maps.shape == (head_channels(NETWORKS[name].heads), 192, 192)
    assert len(np.unique(maps[:, 64:128, 64:128])) > 1
    # The packed weights are all that the network has.
    loaded = {k: v for k, v in load_network(package).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.testing.assert_close(loaded, load_file(package.weights))


def test_drawn_instances_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    package = write_package(tmp_path / "model", "maskrcnn", MASK, overlap=24)
    maps = []
    for batch in (1, 3):
        (tmp_path / str(batch)).mkdir()
        maps.append(infer(tmp_path / str(batch), package.folder, batch))
    assert maps[0].any()
    np.testing.assert_array_equal(maps[0], maps[1])


def test_wrong_arguments_are_one_line() -> None:
    for name, args, message in (
        ("unet", {"depth": 3}, "network 'unet'.*depth"),
        ("mtl", NARROW | TRANSFORMER | {"heads": 3}, "16 channels cannot be divided among 3 heads"),
        ("squeeze-unet", {"stride": 4}, "stride 4"),
        ("squeeze-unet", {"widths": [4, 8]}, "5 widths"),
        ("smp-unet", {"encoder": "resnet35"}, "unknown encoder 'resnet35'"),
        ("smp-unet", {"encoder": "tu-nothing"}, "unknown encoder 'tu-nothing'"),
        ("smp-unet", {"decoder_channels": [8, 4]}, r"decoder_channels \[8, 4\]: use 5 values"),
        ("linknet34", {"encoder_weights": "/nowhere/r.pth"}, r"encoder_weights /nowhere/r\.pth: no such file"),
    ):
        with pytest.raises(PipelineError, match=message) as caught:
            build_network(name, 1, args)
        assert len(str(caught.value)) < 300


def test_position_table_is_interpolated() -> None:
    torch.manual_seed(0)
    positions = PositionTable(2, 8)
    zero = torch.zeros(1, 2, 8, 8)
    torch.testing.assert_close(positions(zero), positions.table)
    with torch.no_grad():
        positions.table.copy_(torch.linspace(0, 7, 8).expand(1, 2, 8, 8))
    wide = positions(torch.zeros(1, 2, 4, 16))
    assert wide.shape == (1, 2, 4, 16)
    assert (wide.diff(dim=3) > 0).all()  # a ramp stays one
    torch.testing.assert_close(wide[:, :, 0], wide[:, :, 3])


def test_attention_sees_every_token() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2).eval()
    tokens = torch.rand(1, 5, 8)
    changed = tokens.clone()
    changed[0, 4] += 1
    assert (attention(tokens)[0, 0] != attention(changed)[0, 0]).any()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(attention(tokens)[:, order], attention(tokens[:, order]))


@pytest.mark.parametrize(
    ("name", "brought_to"),
    [("cenet", lambda x: x * 3.2 - 1.6), ("linknet34", lambda x: x), ("hovernet-se", lambda x: x)],
)
def test_published_inputs(name: str, brought_to: Any) -> None:
    """Without ``normalise`` the encoder sees what it saw in the code that a network is taken from."""
    image, seen = torch.rand(1, 3, 64, 64), []
    for normalise in (False, True):
        network = build_network(name, 1, SMALL[name] | {"normalise": normalise}, pretrained=False).eval()
        network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.inference_mode():
            network(image)
    torch.testing.assert_close(seen[0], brought_to(image))
    torch.testing.assert_close(seen[1], ImageNetNormalise()(image))


def test_dense_atrous_convolution() -> None:
    block = DenseAtrousConvolution(1)
    for layer in block.children():  # each passes its input on
        nn.init.zeros_(layer.bias)
        nn.init.dirac_(layer.weight)
    x = torch.randn(1, 1, 24, 24)
    torch.testing.assert_close(block(x), x + 4 * x.relu())
    # One more pixel of the longest branch: 1 + 3 + 5 to each side.
    for layer in block.children():
        nn.init.ones_(layer.weight)
    point = torch.zeros(1, 1, 24, 24)
    point[0, 0, 12, 12] = 1
    reached = block(point)[0, 0].nonzero()
    assert (reached.min(), reached.max()) == (12 - 9, 12 + 9)
    # The four branches share three dilated convolutions and one projection.
    assert [tuple(p.shape) for p in block.parameters() if p.ndim > 1] == [(1, 1, 3, 3)] * 3 + [(1, 1, 1, 1)]


def test_residual_multi_pooling() -> None:
    torch.manual_seed(0)
    block = ResidualMultiPooling(3)
    x = torch.rand(1, 3, 12, 18)
    y = block(x)
    assert y.shape == (1, 7, 12, 18)
    torch.testing.assert_close(y[:, :3], x)
    nn.init.constant_(block.project.weight, 1.0)
    nn.init.zeros_(block.project.bias)
    ramp = torch.arange(36.0).view(1, 1, 6, 6).expand(1, 3, 6, 6)
    torch.testing.assert_close(block(ramp)[0, 6], torch.full((6, 6), 3 * 35.0))  # the pool of 6 sees the maximum alone
    assert block(torch.rand(1, 3, 2, 1)).shape == (1, 7, 2, 1)


def test_attention_gate() -> None:
    torch.manual_seed(0)
    gate = AttentionGate(6).eval()
    skip, signal = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7)
    weight = gate.weight(skip, signal)
    assert weight.shape == (2, 1, 5, 7)
    assert ((weight > 0) & (weight < 1)).all()
    torch.testing.assert_close(gate(skip, signal), skip * weight)
    assert (gate.weight(skip, signal + 1) != weight).any()  # the decoder's map has a say
    for bias, expected in ((-100.0, torch.zeros_like(skip)), (100.0, skip)):
        nn.init.constant_(gate.score[1].bias, bias)
        torch.testing.assert_close(gate(skip, signal), expected)


def test_multi_dilated_block() -> None:
    block = MultiDilatedBlock(5, 8).eval()
    assert [branch[0].out_channels for branch in block.branches] == [2, 2, 4]
    assert [branch[0].dilation for branch in block.branches] == [(1, 1), (2, 2), (4, 4)]
    x = torch.zeros(1, 5, 20, 20)
    y = x.clone()
    y[0, :, 10, 10] = 1
    reached = (block(x) != block(y)).any(dim=1)[0].nonzero()
    assert (reached.min(), reached.max()) == (6, 14)
    assert MultiDilatedBlock(8, 8).eval()(torch.rand(1, 8, 4, 4)).shape == (1, 8, 4, 4)
    assert isinstance(MultiDilatedBlock(8, 8).shortcut, nn.Identity)


# The command


@pytest.mark.parametrize("name", [name for name in FAMILIES if not NETWORKS[name].instances])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    with torch.device("meta"):
        network, image = build_network(name, 2, SMALL[name]).eval(), torch.empty(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    assert count_multiply_adds(network, image) * 2 == counter.get_total_flops()


def test_networks_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_fetching(monkeypatch)
    assert main(["networks", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == list(NETWORKS)
    for one in listed.values():
        assert {"parameters", "heads", "multiply_adds_per_pixel", "image", "stride", "source"} <= set(one)
        assert one["parameters"] > 0
        assert one["multiply_adds_per_pixel"] > 0
    # The U-Net's by hand: two convolutions a level of the encoder, two and the enlargement of the decoder.
    by_hand = 9 * (3 * 64 + 64 * 64)
    by_hand += sum(9 * (w * w // 2 + w * w) // (w // 64) ** 2 for w in (128, 256, 512, 1024))
    by_hand += sum((9 * (2 * w * w + w * w) + 2 * w * w) // (w // 64) ** 2 for w in (64, 128, 256, 512))
    assert listed["unet"]["multiply_adds_per_pixel"] == by_hand + 2 * 64
    assert main(["networks", "resunet", "mtl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["network", "resunet", "mtl"]
    assert lines[1].split()[1] == "3,320,714"
    assert main(["networks", "unet9"]) == 2


# Pretrained encoders


class TinyEncoder(nn.Module):
    def __init__(self, weights: str | None = None, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        load_encoder(self, weights, {}, "the tiny network")


def tiny_state() -> dict[str, Any]:
    torch.manual_seed(1)
    encoder = TinyEncoder()
    nn.init.normal_(encoder.bn1.running_mean)
    return dict(encoder.state_dict())


def forbid_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", offline)
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)


@pytest.mark.parametrize("name", [n for n in FAMILIES if NETWORKS[n].pretrained])
def test_weights_that_cannot_be_fetched_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_fetching(monkeypatch)
    args = {} if name == "hovernet-se" else SMALL[name]
    with pytest.raises(PipelineError, match=r"imagenet: the weights of .* cannot be fetched: .*no route to host"):
        build_network(name, 2, args | {"encoder_weights": "imagenet"})


def test_a_failing_disk_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    for suffix in ("safetensors", "npz", "pth"):
        path = tmp_path / f"weights.{suffix}"
        path.write_bytes(b"")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fail)
            with pytest.raises(OSError, match="Input/output error"):
                read_state(path)
    with pytest.raises(OSError, match="Input/output error"):
        load_encoder(TinyEncoder(), "imagenet", {"imagenet": fail}, "the tiny network")


def test_fetched_weights_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    state = dict(resnet34(weights=None).state_dict())  # with its classifier
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    encoder = ResNet34Encoder("imagenet")
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, state[name])


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt", "trainer", "package"])
def test_encoder_weights_from_a_file(kind: str, tmp_path: Path) -> None:
    state = tiny_state()
    path = tmp_path / f"weights.{'pth' if kind == 'trainer' else 'safetensors' if kind == 'package' else kind}"
    if kind == "safetensors":
        save_file(state | {"fc.weight": torch.zeros(2, 4)}, path)
    elif kind == "package":  # a whole network, without counters
        packed = {f"encoder.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        save_file(packed | {"head.weight": torch.zeros(2)}, path)
    elif kind == "npz":
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    elif kind == "pt":
        torch.save(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    for name, tensor in TinyEncoder(str(path)).state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, state[name])


def test_wrong_files_are_one_line(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "run", "code ran"))

    contents: dict[str, tuple[bytes, str]] = {
        "text.pth": (b"hello", "cannot be read"),
        "evil.pth": (pickle.dumps(Evil(), protocol=2), "cannot be read"),
        "cut.safetensors": (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "cannot be read"),
        "cut.npz": (b"PK\x03\x04", "cannot be read"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    messages = {name: message for name, (_, message) in contents.items()}
    torch.save([1, 2], tmp_path / "list.pt")
    messages["list.pt"] = "holds no state dict"
    save_file({"conv1.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other.safetensors")
    messages["other.safetensors"] = (
        r"5 of 6 tensors of the tiny network are missing or of another shape, first conv1\.bias"
    )
    messages["missing.pth"] = "no such file"
    for name, message in messages.items():
        with pytest.raises(PipelineError, match=message) as caught:
            TinyEncoder(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    save_file(tiny_state(), tmp_path / "narrow.safetensors")
    with pytest.raises(PipelineError, match="6 of 6 tensors"):
        TinyEncoder(str(tmp_path / "narrow.safetensors"), channels=5)


def test_squeeze_encoder_takes_torchvisions_weights(tmp_path: Path) -> None:
    torch.manual_seed(2)
    reference = squeezenet1_0(weights=None).eval()
    for module in reference.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias, std=0.1)
    torch.save(reference.state_dict(), tmp_path / "squeezenet.pth")
    encoder = SqueezeEncoder(str(tmp_path / "squeezenet.pth")).eval()
    image = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        # torchvision does not pad the first convolution; with stride 1 both see the same windows.
        encoder.conv1.stride = reference.features[0].stride = (1, 1)
        expected = reference.features[1](reference.features[0]((image - mean) / std))
        found = encoder(image)[0][:, :, 3:-3, 3:-3]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        features = torch.rand(1, 96, 9, 9)
        torch.testing.assert_close(encoder.fire2(features), reference.features[3](features))
        features = torch.rand(1, 512, 5, 5)
        torch.testing.assert_close(encoder.fire9(features), reference.features[12](features))


def test_squeeze_encoder_takes_caffes_weights(tmp_path: Path) -> None:
    source = SqueezeEncoder()
    arrays = {
        ("/".join(k.split(".", 1)) if k.startswith("fire") else k): v.numpy() for k, v in source.state_dict().items()
    }
    assert "fire2/squeeze1x1.weight" in arrays
    np.savez(tmp_path / "squeezenet.npz", **arrays)
    network = build_network("squeeze-unet", 1, {"encoder_weights": str(tmp_path / "squeezenet.npz")})
    torch.testing.assert_close(network.encoder.state_dict(), source.state_dict())


def test_squeeze_unet_keeps_the_resolution_with_stride_1() -> None:
    network = build_network("squeeze-unet", 2, {"widths": [4, 6, 8, 8], "stride": 1}).eval()
    with torch.inference_mode():
        assert network.encoder(torch.rand(1, 3, 32, 32))[0].shape == (1, 96, 32, 32)
        assert network(torch.rand(1, 3, 32, 48)).shape == (1, 2, 32, 48)


def test_pretrained_squeezenet(shared_data: Path) -> None:
    path = shared_data / "imagenet_squeezenet" / "squeezenet_v1_0_decoded.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    state = read_state(path)
    encoder = SqueezeEncoder(str(path)).eval()
    np.testing.assert_array_equal(encoder.conv1.weight.detach(), state["conv1.weight"])
    # Trained filters answer to structure and leave white paper nearly alone beside it.
    with torch.inference_mode():
        texture = encoder(torch.rand(1, 3, 64, 64))[3].mean()
        plain = encoder(torch.ones(1, 3, 64, 64))[3].mean()
    assert torch.isfinite(texture)
    assert texture != plain


@pytest.mark.parametrize("to", [{"scale_factor": 2.0}, {"size": (7, 9)}])
def test_bilinear_interpolation_with_its_own_kernel(to: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # On GPUs, deterministic mode would replace it; here a device that is not the CPU stands for one.
    modes = []

    def interpolate(x: Any, **how: Any) -> Any:
        modes.append(torch.get_deterministic_debug_mode())
        return x

    x = torch.rand(1, 2, 4, 5)
    expected = torch.nn.functional.interpolate(x, mode="bilinear", align_corners=False, **to)
    torch.testing.assert_close(blocks.bilinear(x, **to), expected, rtol=0, atol=0)
    monkeypatch.setattr(blocks.functional, "interpolate", interpolate)
    torch.set_deterministic_debug_mode("warn")
    try:
        with torch.no_grad():
            blocks.bilinear(x.to("meta"), **to)
            blocks.bilinear(x, **to)
        blocks.bilinear(x.to("meta"), **to)
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")
    assert modes == [0, 1, 1]
