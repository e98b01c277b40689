"""Mixture-of-experts layers by hand-written CUDA kernels.

``anabranch.torch`` has the layer as a PyTorch operation, ``anabranch.transformers`` makes Hugging Face models use it. Neither PyTorch nor
Transformers is imported before its module is.
"""

from .__about__ import VERSION as __version__
from ._routing import Routing

__all__ = ["Routing", "__version__"]
