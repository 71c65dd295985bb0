"""EfficientNet-Lite0 (arXiv 1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation)."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from speeder.io.assets_convert import EFFICIENTNET_LITE0

# repeats, kernel, stride of the first, expansion, channels
_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
_BATCH_NORM_EPS = 1e-3  # TensorFlow's, which trained the weights


class _SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's SAME: an odd remainder goes to the right and the bottom."""

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        totals = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in images.shape[2:]]
        before = [total // 2 for total in totals]
        if any(total % 2 for total in totals):
            after = [total - total // 2 for total in totals]
            images = functional.pad(images, (before[1], after[1], before[0], after[0]))
            before = [0, 0]
        return functional.conv2d(images, self.weight, self.bias, self.stride, before, 1, self.groups)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    layers = [
        _SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=_BATCH_NORM_EPS),
    ]
    return nn.Sequential(*layers, nn.ReLU6(inplace=True)) if relu else nn.Sequential(*layers)


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; with a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = _conv(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _conv(width, width, kernel, stride, groups=width)
        self.project = _conv(width, outputs, 1, relu=False)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        output = self.project(self.depthwise(self.expand(images)))
        return output + images if self.skip else output


class EfficientNetLite0(nn.Module):
    """RGB `(N, 3, 224, 224)` as `(byte - 127) / 128` to `(N, 1280)` features or `(N, 1000)` logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 3, stride=2)
        blocks, inputs = [], 32
        for repeats, kernel, first_stride, expansion, outputs in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(inputs, outputs, kernel, 1 if repeat else first_stride, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv(inputs, EFFICIENTNET_LITE0["num_features"], 1)
        self.classifier = nn.Linear(EFFICIENTNET_LITE0["num_features"], EFFICIENTNET_LITE0["num_classes"])

    @classmethod
    def load(cls, folder: str | Path) -> "EfficientNetLite0":
        """The model in evaluation mode, from the asset's ready folder."""
        model = cls()
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval()

    def features(self, images: Tensor) -> Tensor:
        """`(N, 3, H, W)` -> `(N, 1280)`, the mean over positions of the last convolution."""
        return self.head(self.blocks(self.stem(images))).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """`(N, 3, H, W)` -> `(N, 1000)` ImageNet logits."""
        return self.classifier(self.features(images))
