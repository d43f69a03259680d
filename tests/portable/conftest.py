"""What the tests of the portable runtime share."""

# Where the distribution is installed its .pth file does this at every start of Python, and elsewhere these tests have to:
# before it, nvtripy cannot be imported.
import nvtripy_portable  # noqa: F401
