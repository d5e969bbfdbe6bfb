"""Train the demo classifier on Fashion-MNIST and write the three files of onnxslim/demo.

Needs the data (Debian: `apt-get install dataset-fashion-mnist`) and, in an environment of its own,
`pip install torch==2.13.0 onnx onnxruntime`. The files in the repository were made on one CPU core by

    python benchmarks/train_demo.py --data /usr/share/datasets/fashion-mnist --output onnxslim/demo

Everything random comes from `--seed`, so a second run on the same kind of CPU gives the same files. The test images
are read only after training, to be evaluated once by ONNX Runtime on the file that was exported.

The network is trained to be made smaller: while most epochs run, a penalty draws whole channels towards zero, as in
network slimming (Liu et al. 2017, arXiv 1708.06519), so that what it knows gathers in fewer of them. Its strength was
chosen by the accuracy after pruning and quantizing on 5,000 of the training images, which no training sees:
`--held-out` trains the same network, leaves the test images unread and writes those as evaluation.npz instead.
"""

import argparse
import copy
import gzip
import math
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

DATA = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
PIXEL_MEAN = 0.2860  # of the 60,000 training images, scaled to 0..1
PIXEL_DEVIATION = 0.3530
MAX_SHIFT = 2  # pixels
MOMENTUM = 0.9
NEGLIGIBLE = 1e-12
PENALTY_FALLS, PENALTY_ENDS = 0.6, 0.9  # shares of the training: full strength before, nothing after
CALIBRATION_IMAGES = 400
EVALUATION_IMAGES_PER_CLASS = 100
HELD_OUT_IMAGES_PER_CLASS = 500
OPSET = 17


class ResidualBlock(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Two 3x3 convolutions beside a shortcut: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            # Without a BatchNorm: its bias would get the gradients of bn2's and, being equal, be exported as an alias.
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        inner = self.bn2(self.conv2(inner))
        return self.relu2(inner + self.shortcut(x))


class FashionCnn(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Residual CNN: uint8 images [N, 1, 28, 28] -> float32 logits [N, 10], preprocessing included.

    The widths 48 and 80 are multiples of 16, and 30 % fewer channels (32 and 56) are multiples of 8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1 / 255))
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN))
        self.register_buffer("deviation", torch.tensor(PIXEL_DEVIATION))
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(1, 48, 3, padding=1, bias=False))
        self.stem.add_module("bn", nn.BatchNorm2d(48))
        self.stem.add_module("relu", nn.ReLU())
        self.stem.add_module("pool", nn.MaxPool2d(2))
        self.stage1 = ResidualBlock(48, 48)
        self.stage2 = ResidualBlock(48, 80, stride=2)
        self.stage3 = ResidualBlock(80, 80)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(80, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        x = (image.float() * self.scale - self.mean) / self.deviation
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(self.pool(x).flatten(1))

    def channel_scales(self) -> list[list[Tensor]]:
        """Return what scales the channels, [channels, ...] each; those of one list scale the same channels.

        Channels that are added are one channel: it can only go from all places that write it.
        """
        first, second, third = self.stage1, self.stage2, self.stage3
        return [
            [self.stem.bn.weight, first.bn2.weight],
            [second.bn2.weight, second.shortcut.weight, third.bn2.weight],
            *([block.bn1.weight] for block in (first, second, third)),
        ]


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes: images [count, 28, 28] or labels [count], uint8."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    header = np.frombuffer(content, dtype=">i4", count=1 + dimensions)
    return np.frombuffer(content, dtype=np.uint8, offset=header.nbytes).reshape(header[1:])


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [count, 1, 28, 28] and labels int64 [count] of `train` or `t10k`."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return images[:, None].copy(), labels.astype(np.int64)


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images and shift each by up to MAX_SHIFT pixels; zero is the background."""
    count, _, height, width = images.shape
    mirrored = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
    padded = functional.pad(mirrored, [MAX_SHIFT] * 4)
    rows = torch.randint(0, 2 * MAX_SHIFT + 1, (count, 1, 1)) + torch.arange(height)[:, None]
    columns = torch.randint(0, 2 * MAX_SHIFT + 1, (count, 1, 1)) + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


@torch.no_grad()  # type: ignore[untyped-decorator]
def shrink(scales: list[Tensor], amount: float) -> None:
    """Move the norm of every channel's scales towards zero by `amount`: the proximal step of a group lasso."""
    norms = torch.cat([scale.flatten(1) if scale.ndim > 1 else scale[:, None] for scale in scales], dim=1).norm(dim=1)
    factors = (1 - amount / norms.clamp_min(1e-12)).clamp_min(0)
    for scale in scales:
        scale.mul_(factors.reshape(-1, *[1] * (scale.ndim - 1)))


@torch.no_grad()  # type: ignore[untyped-decorator]
def flush(model: nn.Module) -> None:
    """Set to zero what the weight decay of channels without a gradient has left: subnormals, slow on some CPUs."""
    for weight in model.parameters():
        weight[weight.abs() < NEGLIGIBLE] = 0


def penalty_strength(progress: float) -> float:
    """Return the share of the penalty that is in force after a share of the training."""
    return min(1.0, max(0.0, (PENALTY_ENDS - progress) / (PENALTY_ENDS - PENALTY_FALLS)))


def train(
    images: np.ndarray, labels: np.ndarray, *, epochs: int, batch: int, peak_rate: float, sparsity: float
) -> FashionCnn:
    """Train on augmented images with SGD, a one-cycle rate and label smoothing; bfloat16 inside, float32 weights."""
    model = FashionCnn()
    model.to(memory_format=torch.channels_last)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=peak_rate, momentum=MOMENTUM, nesterov=True, weight_decay=5e-4)
    steps = math.ceil(len(inputs) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=epochs * steps, pct_start=0.25)
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(inputs)).split(batch):
            shown = augment(inputs[chosen]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(shown)
            loss = functional.cross_entropy(logits.float(), targets[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate = schedule.get_last_lr()[0] / (1 - MOMENTUM)  # what a steady gradient is multiplied by
            for scales in model.channel_scales():
                shrink(scales, rate * sparsity * penalty_strength(schedule.last_epoch / (epochs * steps)))
            schedule.step()
            total += loss.item() * len(chosen)
        seconds = time.perf_counter() - start
        silent = [int((scales[0].abs() < 1e-3).sum()) for scales in model.channel_scales()]
        mean = total / len(inputs)
        print(f"epoch {epoch + 1}/{epochs}: loss {mean:.4f}, channels at zero {silent}, {seconds:.0f} s", flush=True)
    flush(model)
    model.to(memory_format=torch.contiguous_format).eval()
    return model


def export(model: FashionCnn, path: Path) -> None:
    """Write the model as ONNX with its BatchNormalization nodes and a dynamic batch axis N."""
    with warnings.catch_warnings():
        # Only the TorchScript exporter takes PRESERVE, which keeps the BatchNormalization nodes apart.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, 28, 28, dtype=torch.uint8),),
            path,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )
    onnx.checker.check_model(path, full_check=True)


def choose_balanced(labels: np.ndarray, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """Return shuffled indices of `per_class` samples of every class."""
    groups = [generator.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in range(CLASSES)]
    return generator.permutation(np.concatenate(groups))


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images that the exported model classifies right under ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = np.split(images, range(500, len(images), 500))
    logits = np.concatenate([session.run(["logits"], {"image": batch})[0] for batch in batches])
    return float(np.mean(logits.argmax(axis=1) == labels))


def main() -> None:
    """Train, export, choose the images and report the accuracy."""
    parser = argparse.ArgumentParser(description="Train the demo classifier on Fashion-MNIST and write its files.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four gzipped IDX files")
    parser.add_argument("--output", type=Path, default=Path("onnxslim/demo"), help="folder for the three files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--peak-rate", type=float, default=0.2, help="highest learning rate of the cycle")
    parser.add_argument("--sparsity", type=float, default=1e-3, help="strength of the penalty on the channels' scales")
    parser.add_argument("--held-out", action="store_true", help="leave the test images unread")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=2017)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    generator = np.random.default_rng(arguments.seed)

    images, labels = read_split(arguments.data, "train")
    drawn = generator.choice(len(images), CALIBRATION_IMAGES, replace=False)
    calibration = images[drawn]
    free = labels.copy()
    free[drawn] = -1  # no class: pruning and quantizing see these images
    held_out = choose_balanced(free, HELD_OUT_IMAGES_PER_CLASS, copy.deepcopy(generator))
    model = train(
        np.delete(images, held_out, axis=0),
        np.delete(labels, held_out),
        epochs=arguments.epochs,
        batch=arguments.batch,
        peak_rate=arguments.peak_rate,
        sparsity=arguments.sparsity,
    )

    arguments.output.mkdir(parents=True, exist_ok=True)
    model_path = arguments.output / "fashion_cnn.onnx"
    export(model, model_path)
    np.savez_compressed(arguments.output / "calibration.npz", image=calibration)
    if arguments.held_out:
        shown, classes = images[held_out], labels[held_out]
    else:
        shown, classes = read_split(arguments.data, "t10k")
        print(f"all {len(classes)} test images: {accuracy(model_path, shown, classes):.4f}")
        chosen = choose_balanced(classes, EVALUATION_IMAGES_PER_CLASS, generator)
        shown, classes = shown[chosen], classes[chosen]
    np.savez_compressed(arguments.output / "evaluation.npz", image=shown, labels=classes)
    print(f"the {len(classes)} images of evaluation.npz: {accuracy(model_path, shown, classes):.4f}")


if __name__ == "__main__":
    main()
