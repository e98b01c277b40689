"""Mixture-of-experts layers by hand-written CUDA kernels.

``anabranch.torch`` has the layer as a PyTorch operation, ``anabranch.transformers`` makes Hugging Face models use it. Neither PyTorch nor
Transformers is imported before its module is.
"""

from ._routing import Routing

__version__ = "0.1.0"
__all__ = ["Routing", "__version__"]
