"""An encoder of small images that keeps where things are."""

from __future__ import annotations

from torch import Tensor, nn

from lab.models.cnn import image_shape, stage


class Encoder(nn.Module):
    """Maps images (B, C, H, W) to embeddings (B, num_outputs).

    Each width in `channels` is a stage of two convolutions; the image is halved between stages.
    The mean over positions of `model=cnn` would lose what tells a 6 from a 9.
    """

    def __init__(self, *, input_shape: list[int], num_outputs: int, channels: list[int]) -> None:
        super().__init__()
        before, height, width = image_shape(input_shape, 2 ** len(channels))
        layers: list[nn.Module] = []
        for index, after in enumerate(channels):
            if index:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            layers.append(stage(before, after, "group"))
            before = after
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(before * height * width, num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs))
        return outputs
