from .unet import AUTO_MEMORY_MB, DetailerHead

__all__ = ["AUTO_MEMORY_MB", "DetailerHead"]
