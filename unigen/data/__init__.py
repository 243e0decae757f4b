"""Files to packs: the formats, the data set of records, and the loader."""

from unigen.data.dataset import BadData, UnifiedGenerationDataset

__all__ = ["BadData", "UnifiedGenerationDataset"]
