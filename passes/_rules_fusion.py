"""Every rule that makes fewer nodes of several, in the order in which they are tried at a node.

What is recognized as one operator comes first: a factor that goes into a weight is no longer there to be recognized.
"""

from __future__ import annotations

from onnxslim.passes._rules import Rule
from onnxslim.passes._rules_activation import ACTIVATION_RULES
from onnxslim.passes._rules_affine import AFFINE_RULES
from onnxslim.passes._rules_batchnorm import BATCHNORM_RULES
from onnxslim.passes._rules_clip import CLIP_RULES
from onnxslim.passes._rules_constants import CONSTANT_RULES
from onnxslim.passes._rules_gemm import GEMM_RULES
from onnxslim.passes._rules_norm import NORM_RULES
from onnxslim.passes._rules_pad import PAD_RULES

__all__ = ["FUSION_RULES"]

FUSION_RULES: tuple[Rule, ...] = (
    *NORM_RULES,
    *ACTIVATION_RULES,
    *CLIP_RULES,
    *PAD_RULES,
    *BATCHNORM_RULES,
    *AFFINE_RULES,
    *GEMM_RULES,
    *CONSTANT_RULES,
)
