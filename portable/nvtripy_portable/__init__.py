"""nvtripy without TensorRT: what NVIDIA's nvtripy needs below it, on any machine.

Importing this package installs :mod:`nvtripy_portable.importing`'s finder, after which ``import nvtripy`` works where
NVIDIA's ``mlir_tensorrt`` is absent. Where it is present, it is used and nothing here is. An installed
``nvtripy-portable`` does this at every start of Python through its ``.pth`` file, so it must stay cheap to import.
"""

from nvtripy_portable import importing

__version__ = "0.1.0"

importing.install()
