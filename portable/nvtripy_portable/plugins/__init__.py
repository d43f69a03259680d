"""What a plug-in's name means here.

``nvtripy.plugin(name, inputs, output_info, ...)`` calls something by its name: on TensorRT a library of NVIDIA's or of
one's own, here what is registered under that name::

    from nvtripy_portable import plugins

    plugins.register("Twice", compute=lambda x: 2 * x)
    y = tp.plugin("Twice", [x], output_info=[(x.rank, x.dtype)])

A meaning is a function of NumPy arrays, a function in C (``include/nvtripy_portable_plugin.h``), or both: the second
runs in the middle of a native program, with no Python between two layers.
"""

from nvtripy_portable.plugins import built_in
from nvtripy_portable.plugins.native import include_folder
from nvtripy_portable.plugins.registry import Field, PluginError, register, registered, unregister

__all__ = ["Field", "PluginError", "include_folder", "register", "registered", "unregister"]

built_in.register_all()
