"""``mlir_tensorrt`` as nvtripy sees it: the surface that nvtripy 0.1.7 imports, and nothing else.

These modules translate and decide nothing: the compiler side builds a :class:`nvtripy_portable.graph.Graph`, the
runtime side holds arrays and calls the executor. They are loaded under the name ``mlir_tensorrt`` (see
:mod:`nvtripy_portable.importing`).
"""
