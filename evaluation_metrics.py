"""The import the user guide promises: ``from evaluation_metrics import bleu, frechet_distance``.

Every metric is a function that returns a :class:`Result`: a number with its identity and its 95 % interval,
or None with the reason and the fix. Shapes and sources stand with each; docs/metrics.md shows them at work.
"""

from unigen.evaluation.detectors import Detector
from unigen.evaluation.features import (
    Extractor,
    Features,
    FeatureStore,
    inception_extractor,
    load_extractor,
    module_extractor,
    tower_extractor,
    vit_extractor,
)
from unigen.evaluation.images import (
    around_score,
    clip_direction,
    clip_score,
    cmmd,
    frechet_distance,
    frechet_distance_infinity,
    kid,
    neighbours,
    similarity,
)
from unigen.evaluation.objects import geneval
from unigen.evaluation.perceptual import edit_changed, edit_stayed, lpips, psnr, ssim
from unigen.evaluation.results import CannotRun, Result
from unigen.evaluation.statistics import Comparison, compare
from unigen.evaluation.text import (
    accuracy,
    anls,
    bertscore,
    bleu,
    chrf,
    distinct,
    exact_match,
    length_ratio,
    meteor,
    rouge,
)
from unigen.evaluation.towers import PictureTower

__all__ = [
    "CannotRun", "Comparison", "Detector", "Extractor", "FeatureStore", "Features", "PictureTower", "Result",
    "accuracy", "anls", "around_score", "bertscore", "bleu", "chrf", "clip_direction", "clip_score", "cmmd",
    "compare", "distinct", "edit_changed", "edit_stayed", "exact_match", "frechet_distance",
    "frechet_distance_infinity", "geneval", "inception_extractor", "kid", "length_ratio", "load_extractor",
    "lpips", "meteor", "module_extractor", "neighbours", "psnr", "rouge", "similarity", "ssim",
    "tower_extractor", "vit_extractor",
]  # fmt: skip
