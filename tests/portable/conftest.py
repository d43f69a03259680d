"""What the tests of the portable runtime share."""

# Before this, nvtripy cannot be imported. Where the distribution is installed, its .pth file does it at every start of
# Python; elsewhere these tests have to.
import nvtripy_portable  # noqa: F401
