"""Architectures that everybody knows, exported with random weights and a fixed seed: time does not depend on training.

Needs `pip install torch torchvision timm transformers`, which nothing else here does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 0
IMAGE = (1, 3, 224, 224)
SEQUENCE = 128


def _image_model(architecture: str) -> Callable[[], tuple[Any, tuple[Any, ...], list[str]]]:
    def build() -> tuple[Any, tuple[Any, ...], list[str]]:
        import timm
        import torch

        return _settled(timm.create_model(architecture, pretrained=False)), (torch.rand(IMAGE),), ["image"]

    return build


def _settled(model: Any) -> Any:
    """Give batch normalisations statistics, as training does: fresh ones are the identity, which exporters drop."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model.eval()


def _bert() -> tuple[Any, tuple[Any, ...], list[str]]:
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=8000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        attn_implementation="eager",
        return_dict=False,
    )

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config, add_pooling_layer=False)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]

    ids = torch.randint(0, config.vocab_size, (1, SEQUENCE))
    return LastHiddenState().eval(), (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]


MODELS: dict[str, Callable[[], tuple[Any, tuple[Any, ...], list[str]]]] = {
    "resnet18": _image_model("resnet18"),
    "resnet50": _image_model("resnet50"),
    "mobilenetv2": _image_model("mobilenetv2_100"),
    "mobilenetv3_small": _image_model("mobilenetv3_small_100"),
    "efficientnet_b0": _image_model("efficientnet_b0"),
    "convnext_atto": _image_model("convnext_atto"),
    "vit_tiny": _image_model("vit_tiny_patch16_224"),
    "bert_6x384": _bert,
}


def export(folder: Path) -> list[Path]:
    """Write every model to ``folder``, batch 1 and all shapes fixed; one that is there already is kept.

    Raises:
        SystemExit: a package that exporting takes is missing.
    """
    files = {name: folder / f"{name}.onnx" for name in MODELS}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import timm  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"exporting takes: pip install torch torchvision timm transformers ({error})") from None
    for name, file in files.items():
        if file.exists():
            continue
        torch.manual_seed(SEED)
        model, inputs, names = MODELS[name]()
        part = file.with_suffix(".part")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, inputs, str(part), input_names=names, output_names=["output"], opset_version=17, dynamo=False
            )
        part.rename(file)
        print(f"wrote {file}", flush=True)
    return list(files.values())
