from .features import Features, make_features
from .layouts import UNREADABLE, TrainingImage, list_images
from .stream import Batch, Bucket, Stream, make_buckets, shapes_of

__all__ = [
    "UNREADABLE", "Batch", "Bucket", "Features", "Stream", "TrainingImage", "list_images", "make_buckets",
    "make_features", "shapes_of",
]  # fmt: skip
