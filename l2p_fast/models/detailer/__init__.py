from .unet import AUTO_MEMORY_MB, DetailerHead, Settled

__all__ = ["AUTO_MEMORY_MB", "DetailerHead", "Settled"]
